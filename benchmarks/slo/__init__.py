"""Schedulers compared under latency SLOs: arrivals, policies, bounds and the tables drawn from them."""
