"""The machine that a run has: device, precision, memory, load, random numbers, signals.

In: nothing. Out: facts about the machine, and limits. Open `memory.py` first.
"""
