"""The recipe that trains a smaller network."""
