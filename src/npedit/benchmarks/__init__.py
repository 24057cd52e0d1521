"""One file, one benchmark: items, scores, the official file layout. Files whose names begin with _ are shared."""
