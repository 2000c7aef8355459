"""The kernels of each form."""

from __future__ import annotations

from llmcompress.kernels.cpu.codebooks import BookCodes, BookDecoding, BookProduct
from llmcompress.kernels.cpu.formats import Format
from llmcompress.kernels.cpu.product import Decoding, Product, block_size
from llmcompress.kernels.cpu.tables import TableDecoding, TableProduct, TableStreams


def takes_floats(form: Format) -> bool:
    """Return True if the weights of a form are floats, so that products take inputs as they are."""
    return isinstance(form, TableStreams | BookCodes)


def input_block(form: Format) -> int:
    """Return the columns of a block of inputs."""
    return form.input_block if isinstance(form, BookCodes) else block_size(form)


def product_of(form: Format, tokens: int, numbers: int, bfloat16: bool) -> Product | TableProduct | BookProduct:
    """Return the kernel that multiplies by a form."""
    if isinstance(form, TableStreams):
        return TableProduct(form, tokens, bfloat16)
    if isinstance(form, BookCodes):
        return BookProduct(form, tokens, bfloat16)
    return Product(form, tokens, numbers, bfloat16)


def decoding_of(form: Format, bfloat16: bool) -> Decoding | TableDecoding | BookDecoding:
    """Return the kernel that decodes a form."""
    if isinstance(form, TableStreams):
        return TableDecoding(form, bfloat16)
    return BookDecoding(form, bfloat16) if isinstance(form, BookCodes) else Decoding(form, bfloat16)
