"""Fewer decoder blocks: which ones to drop, and the shorter checkpoint that any engine loads."""
