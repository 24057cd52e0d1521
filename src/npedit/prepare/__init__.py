"""From a folder of photos to a training set: a vision-language model looks at each photo, writes edits, and verifies
them."""
