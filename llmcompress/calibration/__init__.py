"""The walk through a model, one decoder block at a time, and the moments that it gathers.

In: a dense model on disk, token sequences. Out: each block with the moments of what its linears read. Open `walk.py`
first.
"""
