"""Latents of codes that are made of other numbers, which train in their place."""
