"""Products with compressed weights, and searches for codes, by LLVM for CPUs and by Triton for GPUs.

In: a compressed matrix and activations, or columns to store. Out: their product, without the dense matrix, or the
stored columns. Open `accelerate.py` first, for searches `column_block.py`.
"""
