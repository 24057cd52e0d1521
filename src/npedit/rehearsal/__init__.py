"""`npedit rehearse`: run a recipe end to end at real size with random weights, before a real training is paid for."""
