"""Layer -> Layer, one file for a method or a close family, by what they store. Importing this package registers them.

In: a layer with its dense weight and the moments of its inputs. Out: the layer with an expression in its place. Methods
store signs (`binary/`), entries of tables (`codebooks/`), integers or floats of few bits (`grids/`), factors
(`low_rank/`), fewer weights (`pruning/`), or streams of bits (`trellises/`); `solvers/` has what they share. Open
`layer.py` first, then `grids/gptq.py`.
"""

from llmcompress.methods import presume, refine, rotate
from llmcompress.methods.binary import billm, binary_low_rank, fdb, pb_llm, planes
from llmcompress.methods.codebooks import pv, vq
from llmcompress.methods.grids import adadim, gguf, gptq, hqq, mxfp, rtn
from llmcompress.methods.low_rank import alternate, factors
from llmcompress.methods.pruning import scores, sparsegpt
from llmcompress.methods.trellises import exl3, trellis
