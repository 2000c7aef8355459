"""A plug-in that lets vLLM load compressed checkpoints of ours as they are."""
