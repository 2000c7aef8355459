"""The streams of a column, searched side by side on the device where the weights are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from llmcompress.methods.solvers import viterbi
from llmcompress.weight.trellis import Trellis

OLDEST_GPU = (7, 0)  # compute capability that Triton compiles for
Search = Callable[[Tensor, Tensor, Tensor], Tensor]


def stream_search(trellis: Trellis, edges: list[int], importance: Tensor) -> Search:
    """The function `(wanted, starts, ends) -> states` for columns whose streams last from one of `edges` to the next.

    `wanted`, and `importance`, what a squared error counts: float32 `[steps, values]`; `starts` and `ends`: the states
    before each stream and after it, int32 `[streams]`, -1 for any end; `states`: after each step, int32 `[steps]`. All
    are on the device of `importance`, where the search happens if it can (`searched_there`).
    """
    device = importance.device
    if device.type == "cpu" or not searched_there(device):
        return _in_threads(trellis, edges, importance)
    from llmcompress.methods.solvers import viterbi_triton

    return viterbi_triton.search(trellis, edges, importance)


def searched_there(device: torch.device) -> bool:
    """True if a device runs the search itself: the CPU, and NVIDIA GPUs where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cpu"
    able = torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    return able and find_spec("triton") is not None


def _in_threads(trellis: Trellis, edges: list[int], importance: Tensor) -> Search:
    """The compiled search, a stream a thread, wherever the weights are."""
    search, workers, weights = viterbi.search(trellis), _workers(torch.get_num_threads()), importance.numpy(force=True)

    def find(wanted: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        asked, begun, ended = wanted.numpy(force=True), starts.tolist(), ends.tolist()
        states = np.empty(len(asked), np.int32)

        def choose(stream: int) -> None:
            part = slice(edges[stream], edges[stream + 1])
            states[part] = search(asked[part], weights[part], begun[stream], ended[stream])

        count = len(begun)
        for _ in workers.map(choose, range(count)) if count > 1 else map(choose, range(1)):
            pass
        return torch.from_numpy(states).to(wanted.device)

    return find


@lru_cache(maxsize=1)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads that search streams side by side; kept, since there is something for them to do in every column."""
    return ThreadPoolExecutor(threads)
