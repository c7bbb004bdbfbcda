"""The decision core. Pure: no asyncio, clock, threads, random, logging, grpc, numpy or torch."""
