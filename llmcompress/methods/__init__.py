"""Layer -> Layer, one file each. Importing this package registers them all."""

from llmcompress.methods import (
    alternate,
    billm,
    eora,
    fdb,
    gptq,
    lqer,
    magnitude,
    pb_llm,
    planes,
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
    "billm",
    "eora",
    "fdb",
    "gptq",
    "lqer",
    "magnitude",
    "pb_llm",
    "planes",
    "refine",
    "rotate",
    "rtn",
    "sparsegpt",
    "svd",
    "trellis",
    "wanda",
]
