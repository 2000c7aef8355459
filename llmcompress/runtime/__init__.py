"""The machine that a run has: device, precision, memory, random numbers, signals, versions of libraries."""
