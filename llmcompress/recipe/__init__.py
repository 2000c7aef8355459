"""Every key that a user may write: schemas, their YAML, and what is wrong with it in words."""
