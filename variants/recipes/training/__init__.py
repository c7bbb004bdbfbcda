"""How recipes train: losses, loop and precision."""
