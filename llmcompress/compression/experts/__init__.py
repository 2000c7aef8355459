"""Experts of a mixture pruned, condensed into a dense layer, or replaced by factors."""
