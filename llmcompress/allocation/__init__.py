"""The choice of steps for a size or a quality: the section `target:` of a recipe.

In: a job with a target. Out: a job with steps for every layer, and the prices behind the choice. Open `allocate.py`
first.
"""
