"""Layer -> Layer, one file each, by what they store. Importing this package registers them all.

In: a layer with its dense weight and the moments of its inputs. Out: the layer with an expression in its place. Open
`layer.py` first, then `grids/gptq.py`.
"""

from llmcompress.methods import presume, refine, rotate
from llmcompress.methods.binary import billm, binary_low_rank, fdb, pb_llm, planes
from llmcompress.methods.codebooks import kmeans, pv, vq
from llmcompress.methods.grids import adadim, gguf, gptq, hqq, mxfp, rtn
from llmcompress.methods.low_rank import alternate, eora, factors, lqer, svd
from llmcompress.methods.pruning import dimap, magnitude, random_mask, relevance, sparsegpt, wanda
from llmcompress.methods.trellises import exl3, trellis

__all__ = [
    "adadim",
    "alternate",
    "billm",
    "binary_low_rank",
    "dimap",
    "eora",
    "exl3",
    "factors",
    "fdb",
    "gguf",
    "gptq",
    "hqq",
    "kmeans",
    "lqer",
    "magnitude",
    "mxfp",
    "pb_llm",
    "planes",
    "presume",
    "pv",
    "random_mask",
    "refine",
    "relevance",
    "rotate",
    "rtn",
    "sparsegpt",
    "svd",
    "trellis",
    "vq",
    "wanda",
]
