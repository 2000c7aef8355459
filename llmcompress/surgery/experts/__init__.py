"""Experts of a mixture pruned, merged, condensed into a dense layer, or replaced by factors."""
