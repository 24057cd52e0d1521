"""A finished or running training as one HTML file, and its curves."""
