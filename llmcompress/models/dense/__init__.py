"""A dense model: found, opened, its structure understood, one tensor at a time."""
