"""Everything that a recipe asks for, from the name of a model to the finished checkpoint.

In: a model and a recipe. Out: a checkpoint within its quality limits. Open `compress.py` first.
"""
