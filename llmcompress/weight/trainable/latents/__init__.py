"""How the latents of codes are made of numbers that train, where they are not these numbers themselves."""
