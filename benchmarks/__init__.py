"""Measurements behind benchmarks/RESULTS.md. Each file is a command; none asserts a time."""
