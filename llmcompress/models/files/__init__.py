"""Files of a checkpoint: written, locked, resumed and checked."""
