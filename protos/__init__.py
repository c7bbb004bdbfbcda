"""What crosses the wire: the protocol files and the stubs generated beside them (`python -m protos` regenerates)."""
