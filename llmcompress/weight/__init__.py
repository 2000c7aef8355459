"""Compressed weights: expressions, their disk form, the modules that hold them.

In: tensors. Out: expressions, and recursions over them: values, bits, encoding, products. Open `nodes.py` first, then
`expression.py`.
"""
