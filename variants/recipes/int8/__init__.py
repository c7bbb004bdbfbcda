"""Recipes that round to bytes, and what they share."""
