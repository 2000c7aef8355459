"""Products with compressed weights by kernels made for the machine."""
