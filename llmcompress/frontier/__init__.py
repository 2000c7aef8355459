"""One model at many sizes: a sweep over budgets, what each of them costs, and the curve they make."""

from llmcompress.frontier.budgets import Budget, budgets
from llmcompress.frontier.peers import Peer, read_peers
from llmcompress.frontier.sweep import SILENT, Told, frontier

__all__ = ["SILENT", "Budget", "Peer", "Told", "budgets", "frontier", "read_peers"]
