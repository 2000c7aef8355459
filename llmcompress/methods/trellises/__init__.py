"""Methods that store streams of bits, read through a sliding window."""
