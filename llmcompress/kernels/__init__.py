"""Products with compressed weights, and searches for codes, by LLVM for CPUs and by Triton for GPUs.

In: a compressed matrix and activations, or columns to be stored. Out: their product, without the dense matrix, or what
is stored. Open `accelerate.py` first, for searches `column_block.py`.
"""
