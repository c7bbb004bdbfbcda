"""What would have happened, and what could have: the live scheduler under a virtual clock, and bounds for it."""
