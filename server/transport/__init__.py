"""What moves bytes between clients and the engine."""
