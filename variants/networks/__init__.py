"""Small networks built for speed, small enough to read: students for distillation."""
