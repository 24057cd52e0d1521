"""The recipe: strict, typed YAML, and changes to it from the command line."""
