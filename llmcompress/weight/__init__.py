"""What a compressed weight is: an expression, its disk form, and the modules that multiply by it."""
