"""Products with compressed weights on GPUs, by Triton: `prepare` repacks a weight once, `product` multiplies by it."""
