"""A model whose numbers can move: taken from a folder, widened by low-rank terms, written back."""
