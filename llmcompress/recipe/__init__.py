"""Every key that a recipe may have.

In: YAML or plain values. Out: a checked recipe, or one sentence with the line of the mistake. Open `compression.py`
first; `read.py` reads a file.
"""
