"""Methods that store signs."""
