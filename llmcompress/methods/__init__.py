"""Layer -> Layer, one file each. Importing this package registers them all."""

from llmcompress.methods import (
    alternate,
    eora,
    gptq,
    lqer,
    magnitude,
    pb_llm,
    refine,
    rotate,
    rtn,
    sparsegpt,
    svd,
    trellis,
    wanda,
)

__all__ = [
    "alternate",
    "eora",
    "gptq",
    "lqer",
    "magnitude",
    "pb_llm",
    "refine",
    "rotate",
    "rtn",
    "sparsegpt",
    "svd",
    "trellis",
    "wanda",
]
