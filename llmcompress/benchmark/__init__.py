"""Speed and memory of models where they run.

In: models and GGUF files. Out: tokens per second, bytes, shares of the bandwidth. Open `measure.py` first.
"""
