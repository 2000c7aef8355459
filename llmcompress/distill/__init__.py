"""Distillation: the dense teacher teaches the compressed student, whose format and size stay."""

from llmcompress.distill.fused import check_fused
from llmcompress.distill.ready import check_ready
from llmcompress.distill.run import Distilled, distill
from llmcompress.recipe.distillation import Distillation

__all__ = ["Distillation", "Distilled", "check_fused", "check_ready", "distill"]
