"""Text to tokens to batches, and text that a model writes.

In: files, data sets, a tokenizer. Out: token sequences, some of them held out. Open `calibration.py` first.
"""
