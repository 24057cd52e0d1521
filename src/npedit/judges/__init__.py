"""Judges: vision-language models, local or behind a server, that answer a benchmark's questions; a cache of answers."""
