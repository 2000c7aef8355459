"""A size or a quality -> steps for every layer: the section `target:` of a recipe."""
