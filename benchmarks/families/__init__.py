"""Four families of network on real digits: what the techniques are measured and tested on."""
