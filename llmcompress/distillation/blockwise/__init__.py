"""Recovery of one decoder block after the other."""
