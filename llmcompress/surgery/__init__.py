"""Edits of a dense model's structure: a plan from its headers, then a new checkpoint that any engine loads."""

from llmcompress.surgery.alike import Alike, alike_blocks, chosen_blocks
from llmcompress.surgery.depth import Dropped, drop_blocks

__all__ = ["Alike", "Dropped", "alike_blocks", "chosen_blocks", "drop_blocks"]
