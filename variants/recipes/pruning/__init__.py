"""Recipes that take weights or channels away."""
