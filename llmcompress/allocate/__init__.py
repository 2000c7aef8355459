"""State a size or a quality, get the steps of every layer: `target:` of a recipe, before the driver runs."""

from llmcompress.allocate.plan import Allocation, allocate, damage

__all__ = ["Allocation", "allocate", "damage"]
