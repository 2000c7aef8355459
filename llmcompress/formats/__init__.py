"""Formats of other engines, the model card, the Hub.

In: a compressed checkpoint. Out: a folder or file that another engine reads, or a repository on the Hub. Open
`export.py` first.
"""
