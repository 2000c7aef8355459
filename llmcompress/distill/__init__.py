"""Distillation: the dense teacher teaches a student, whose format and size stay."""

from llmcompress.runtime.callable_package import make_callable

make_callable(__name__, "run")
