"""Distillation: the dense teacher teaches the compressed student, whose format and size stay."""

from llmcompress.distill.ready import check_ready
from llmcompress.distill.recipe import Distillation
from llmcompress.distill.run import Distilled, distill

__all__ = ["Distillation", "Distilled", "check_ready", "distill"]
