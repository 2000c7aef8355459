"""A checkpoint as one HTML page: no network, no script, no other file."""
