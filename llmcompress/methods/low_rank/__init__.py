"""Methods that store factors of low rank."""
