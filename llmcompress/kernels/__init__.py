"""Products with compressed weights by kernels made for the machine: LLVM for CPUs, Triton for GPUs.

In: a compressed matrix and activations. Out: their product, without the dense matrix. Open `accelerate.py` first.
"""
