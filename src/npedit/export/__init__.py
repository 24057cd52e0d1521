"""An editor in the forms that other tools open."""
