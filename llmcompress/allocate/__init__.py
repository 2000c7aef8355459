"""State a size or a quality, get the steps of every layer: `target:` of a recipe, before the driver runs."""

from llmcompress.allocate.plan import Allocation, PriceList, allocate, damage, price, reachable

__all__ = ["Allocation", "PriceList", "allocate", "damage", "price", "reachable"]
