"""A compressed weight that trains: master weights behind straight-through rounding."""
