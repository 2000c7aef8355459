"""Compressed weights: expressions, their disk form, and the modules that multiply by them."""
