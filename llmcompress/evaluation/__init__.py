"""The cost of compression: perplexity, tasks and distance to the dense model; reports, tables and plots of it."""
