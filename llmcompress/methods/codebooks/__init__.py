"""Methods that store indices into tables of values."""
