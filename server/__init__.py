"""How a request is answered in time."""
