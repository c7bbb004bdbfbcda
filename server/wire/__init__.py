"""Bytes to values and back, without IO."""
