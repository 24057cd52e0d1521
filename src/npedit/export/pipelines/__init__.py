"""One file for each family: the pipeline of an exported editor for diffusers. The files import nothing of npedit."""
