"""The objective of a step: losses on predictions, on early exits and on hidden states, as one module."""
