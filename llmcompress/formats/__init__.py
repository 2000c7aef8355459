"""Doors out: other formats, the model card, and the Hub."""
