"""Changes of a model's structure: blocks dropped, neurons and heads removed, experts pruned, merged or replaced."""
