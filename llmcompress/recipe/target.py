"""The section `target:` of a recipe: one size, one quality, or one share of zeros.

    target: {bpw: 2.05}      # bits per weight of the decoder's linears, as reports count them; tables are not touched
    target: {bytes: 40MB}    # of all weight files; the token table and the output head are chosen for too
    target: {kl: 0.1}        # most predicted nats per token on held-out text; gives the smallest file
    target: {sparsity: 0.6}  # share of zeros; layers are pruned more where it costs less

The steps of every layer that no rule covers are then chosen. With `engine: vllm` beside a size, only forms that vLLM
multiplies are chosen, as `export --to compressed-tensors` writes them. With `engine: llama.cpp` types of llama.cpp are
chosen, with `engine: mlx` or `exllamav3` their bits. Sizes are those of the files that `export` writes for these four.
With `engine: transformers` the forms are our own, those that our kernels multiply on a CPU, with `transformers-cuda` on
an NVIDIA GPU.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from llmcompress.recipe.yaml import shorten

Engine = Literal["vllm", "llama.cpp", "mlx", "exllamav3", "transformers", "transformers-cuda"]
EXPORTS: dict[str, str] = {"vllm": "compressed-tensors", "llama.cpp": "gguf", "mlx": "mlx", "exllamav3": "exl3"}
OUR_ENGINES: tuple[Engine, ...] = ("transformers", "transformers-cuda")  # which run our own files
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(size: Any) -> Any:
    """Return the bytes of a size such as "40MB" or "1.5 GiB"; anything but text unchanged. Raises ValueError."""
    if not isinstance(size, str):
        return size
    parts = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", size)
    units = {name.lower(): bytes for name, bytes in UNITS.items()}  # in any case: nobody means bits by b, or milli by m
    unit = None if parts is None else units.get(parts[2].lower() or "b")
    if parts is None or unit is None:
        raise ValueError(f"{shorten(size)!r} is no size; write a number and one of {', '.join(UNITS)}, such as 40MB")
    return int(float(parts[1]) * unit)


def _check_engine(name: Any) -> Any:
    """Return the name of an engine. Raises ValueError for text that names none."""
    known = get_args(Engine)
    if not isinstance(name, str) or name in known:
        return name
    near = get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown engine {shorten(name)!r}; {hint}")


class Target(BaseModel, extra="forbid", frozen=True):
    """The aim, exactly one of bpw, bytes, kl and sparsity, and the engine that the model is for."""

    bpw: float | None = Field(None, gt=0, le=16, description="bits per weight of the decoder's linear layers")
    bytes: Annotated[int | None, BeforeValidator(parse_size, json_schema_input_type=int | str | None)] = Field(
        None, gt=0, description="size of all weight files: a number of bytes, or text such as 40MB"
    )
    kl: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most predicted KL to the dense model, in nats per token"
    )
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of zeros among the weights of the decoder's linear layers"
    )
    engine: Annotated[Engine | None, BeforeValidator(_check_engine, json_schema_input_type=Engine | None)] = Field(
        None, description="engine that will run the model; null: llmcompress itself"
    )

    @model_validator(mode="after")
    def _check_aim(self) -> Target:
        if sum(value is not None for value in (self.bpw, self.bytes, self.kl, self.sparsity)) != 1:
            raise ValueError("give exactly one of bpw, bytes, kl and sparsity")
        if self.sparsity is not None and self.engine is not None:
            raise ValueError("engine restricts the forms of a size; leave it out beside sparsity")
        return self

    @property
    def with_tables(self) -> bool:
        """True if steps for the token table and the output head are chosen too."""
        return self.bytes is not None or self.kl is not None

    @property
    def other_engine(self) -> Engine | None:
        """The engine, if it reads files of its own."""
        return None if self.engine in OUR_ENGINES else self.engine

    def for_engine(self, engine: str | None) -> Target:
        """Return the same aim for an engine; None: for llmcompress itself."""
        return self.model_copy(update={"engine": engine})
