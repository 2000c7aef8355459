"""What a step minimises: losses on predictions, on early exits and on hidden states, as one module."""
