"""`npedit check`: is there anything to learn with this recipe, its data, its models? A report before any training."""
