"""Changes of a model's structure: fewer blocks, narrower layers, fewer experts.

In: a model on disk, and what should go. Out: a smaller checkpoint. Open `edited_model.py` first: what every change
writes.
"""
