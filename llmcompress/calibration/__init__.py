"""The walk through a model, one decoder block at a time, and what its tokens count."""
