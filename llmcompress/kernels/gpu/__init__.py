"""Kernels for GPUs, by Triton: `prepare` repacks a weight, `product` multiplies by it; two others choose columns."""
