"""The cost of compression: perplexity, distance to the dense model, tasks.

In: models and text. Out: scores with their noise. Open `score.py` first.
"""
