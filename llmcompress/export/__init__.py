"""Doors out: other formats, the model card, and the Hub."""

from llmcompress.runtime.callable_package import make_callable

make_callable(__name__, "formats")
