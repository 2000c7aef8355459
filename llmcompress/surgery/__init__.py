"""Changes of a model's structure: fewer blocks, narrower layers, fewer experts.

In: a model on disk, and the parts to remove. Out: a smaller checkpoint. `drop.py`, `narrow.py`, `shrink.py` and
`experts/` each have one kind of change. Open `edited_model.py` first, which writes the changed model.
"""
