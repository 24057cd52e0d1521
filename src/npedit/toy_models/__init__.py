"""How the embedded toy's parts (VAE, text-to-image model, critic) are trained: `npedit toy build`."""
