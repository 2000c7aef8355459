"""From the name of a model and a recipe to the finished checkpoint."""
