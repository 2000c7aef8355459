"""The walk through a model, one decoder block at a time, and what its tokens count.

In: a dense model on disk, token sequences. Out: each block with the moments of what its linears read. Open `walk.py`
first.
"""
