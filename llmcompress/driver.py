"""The driver: a dense model and a recipe to a compressed checkpoint and a report.

    recipe -> tokens -> walk -> moments -> methods -> expressions -> checkpoint

Blocks are written as soon as they are done, so memory follows one block, whatever the model's depth.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress import report as reports
from llmcompress.blocks import give_back_memory, product_dtype
from llmcompress.calibrate import Block, InputGroup, walk
from llmcompress.checkpoint import MANIFEST, Writer, check_output, copy_folder, writing
from llmcompress.errors import NumericsError, RecipeError
from llmcompress.fuse import Balanced, balance
from llmcompress.hf import table_entry
from llmcompress.layer import Layer, StepConfig, relative_error
from llmcompress.learning import Tune
from llmcompress.locate import Place
from llmcompress.methods.hessian import damped
from llmcompress.methods.stream_search import searched_there
from llmcompress.modules import LIKE, CompressedLinear, Layout, payload_texts
from llmcompress.moments import Moments
from llmcompress.planning import Job, check_memory, lay, plan_of, warnings
from llmcompress.recipe import Recipe, dump, read_recipe
from llmcompress.report import LayerReport, Report
from llmcompress.runs import apply_in_runs
from llmcompress.source import load_model, resolve
from llmcompress.tokens import CalibrationTokens, calibration_tokens
from llmcompress.validation import INDEX
from llmcompress.weight import Dense, Weight, bits, dense, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGET_DAMPING = 0.1  # of the solve that aims at the dense model's outputs

Progress = Callable[[int, int, float], None]  # (blocks done, blocks, tokens per second)


@dataclass(eq=False)
class Result:
    """A compressed checkpoint on disk and its report. A result without an `output` lives in a temporary folder.

    `distillation`: what `distill` reported, None where the recipe asked for none; `allocation`: how a target was met,
    None where there was none.
    """

    folder: Path
    report: Report
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    distillation: dict[str, Any] | None = field(default=None, repr=False)
    allocation: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, loaded anew at every call."""
        from transformers import AutoModelForCausalLM

        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder)
        return loaded

    def save(self, path: str | Path) -> Path:
        """Copies the checkpoint to `path`, which must not exist. Raises DiskError otherwise."""
        copy_folder(self.folder, Path(path))
        return Path(path)


def compress(
    model: str | Path,
    recipe: Recipe | str | Path | dict[str, Any],
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    tune: Tune | None = None,
) -> Result:
    """Compresses a dense causal LM (folder, Hub id or `smollm2`) as `recipe` says, into the new folder `output`.

    `tune`: what the section `reconstruct:` asks for; `distill:` is left to `recover`. Raises an LLMCompressError, in
    one sentence, for whatever is wrong; then nothing is left behind.
    """
    started = time.monotonic()
    job = lay(resolve(str(model), revision), read_recipe(recipe))
    planned = plan_of(job)
    if job.assignment.unmatched:
        raise RecipeError(job.assignment.complaint())
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="llmcompress-")
        output = Path(temporary.name) / "model"
    check_output(Path(output), planned.bytes + planned.bytes // 20)
    check_memory(planned, device)
    tokens = _tokens(job)
    with writing(Path(output)) as writer:
        run = _Run(job, torch.device(device), tune, 0 if tokens is None else tokens.held_out)
        for block in _blocks(run, tokens, progress):
            for tensors in _compress_block(run, block):
                writer.add(tensors, payload_texts(run.layouts))
        _write_rest(job, run.layouts, writer)
        size = writer.close()
        report = _report(run, tokens, size, time.monotonic() - started)
        writer.write(reports.FILE, json.dumps(report.to_json(), indent=2))
        writer.write(reports.RECIPE, dump(job.recipe))
    return Result(Path(output), report, temporary)


@dataclass(eq=False)
class _Open:
    """A block that may still change. `weights`: the dense matrices `[out, in]` that it learns from, by name; `linears`,
    `learned`: what the checkpoint will hold of it, as it is now."""

    block: Block
    balanced: Balanced
    weights: dict[str, Tensor]
    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    """A job under way. `open`: the blocks that are not written yet, in order; `layouts`: of what is compressed, for the
    config; `rows`: of the report; `blocks`: how each learned; `fused`: what went into their dense weights."""

    job: Job
    device: torch.device
    tune: Tune | None
    held_out: int  # of the calibration sequences
    open: list[_Open] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    rows: list[LayerReport] = field(default_factory=list)
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> dict[str, tuple[StepConfig, ...]]:
        """Of everything that is compressed."""
        return self.job.steps | self.job.tables


def _tokens(job: Job) -> CalibrationTokens | None:
    """The calibration tokens; None for a recipe without calibration."""
    config = job.recipe.calibration
    if config is None:
        return None
    source = job.source
    teacher = partial(load_model, Place(source.name, source.folder))
    return calibration_tokens(config, source.tokenizer(), teacher, source.config)


def _blocks(run: _Run, tokens: CalibrationTokens | None, progress: Progress | None) -> Iterator[Block]:
    """The walk over the model; without tokens, the moments are empty."""
    job, recipe = run.job, run.job.recipe
    return walk(
        job.source,
        job.arch,
        None if tokens is None else tokens.sequences,
        held_out=0 if tokens is None else tokens.held_out,
        needs=job.needs(),
        cap=recipe.cap,
        weights=recipe.token_weights,
        prefix=recipe.prefix,
        dense_stream=recipe.asymmetric > 0,
        outputs=run.tune is not None,
        pairs=run.tune is not None and run.tune.window > 1,
        batch_size=None if run.tune is None else run.tune.batch_size,
        device=run.device,
        dtype=product_dtype(recipe.compute, run.device),
        progress=progress,
    )


def _balanced(job: Job, block: Block) -> Balanced:
    """The block with its channels scaled, where the recipe asks for it."""
    fuse = job.recipe.fuse
    return balance(block, job.source, job.arch, job.steps) if fuse is not None and fuse.awq else Balanced()


def _compress_block(run: _Run, block: Block) -> Iterator[dict[str, Tensor]]:
    """Swaps the block's linears for compressed ones; then, for each block that nothing changes any more, every tensor
    that the checkpoint stores of it."""
    tune, named = run.tune, [name for group in block.groups for name in group.names if name in run.steps]
    balanced = _balanced(run.job, block)
    run.fused += balanced.notes
    here = _Open(block, balanced, {} if tune is None else {name: block.weight(name) for name in named})
    run.open.append(here)
    groups = [group for group in block.groups if any(name in run.steps for name in group.names)]
    for number, group in enumerate(groups):
        if number and tune is not None and tune.between and block.gather is not None:
            group = block.gather(group.names)
        here.linears |= block.swap(_compressed(run, block, group))
        last = number + 1 == len(groups)
        if tune is not None and (last or tune.between) and block.wanted is not None:
            _learn(run, tune, block, last)
        give_back_memory()
    behind = 0 if tune is None or block.index + 1 >= len(run.job.arch.blocks) else tune.window - 1
    while len(run.open) > behind:
        yield _tensors(run, run.open.pop(0))


def _learn(run: _Run, tune: Tune, block: Block, last: bool) -> None:
    """Lets the block learn; together with the one before it, if that is open, once its `last` layers are set."""
    together = run.open if last else run.open[-1:]
    blocks = (block,) if len(together) == 1 or block.before is None else (block.before, block)
    weights = {name: weight for each in together for name, weight in each.weights.items()}
    tuned = tune.learn(blocks, weights, run.held_out)
    for each in together:
        inside = f"{each.block.path}."
        each.linears |= {name: linear for name, linear in tuned.linears.items() if name.startswith(inside)}
        theirs = {name: value for name, value in tuned.dense.items() if name.startswith(inside)}
        each.learned |= _stored(run.job, each.block, theirs)
    run.blocks[block.path] = tuned.found


def _tensors(run: _Run, done: _Open) -> dict[str, Tensor]:
    """Every tensor that the checkpoint stores of a block, and its layouts into the run's."""
    job, path = run.job, done.block.path
    payload: dict[str, Tensor] = {}
    for name, module in done.linears.items():
        run.layouts[name] = module.layout
        payload[f"{name}.weight"] = module.get_parameter("weight").detach()
        if name == job.arch.embedding:
            payload[f"{name}.{LIKE}"] = torch.empty(0, dtype=job.source.read(f"{name}.weight").dtype)
    apart = {f"{name}.weight" for name in done.linears} | set(done.learned)
    inside = (n for n in job.source.tensors if n.startswith(f"{path}.") and n not in apart)
    stored = {name: job.source.read(name) for name in inside}
    return payload | done.learned | stored | done.balanced.tensors(done.block)


def _compressed(run: _Run, block: Block, group: InputGroup) -> dict[str, Weight]:
    """What becomes of the linears of a group, by name."""
    done: dict[str, Weight] = {}
    for name in (name for name in group.names if name in run.steps):
        layer = _layer(run.job, name, group.names[0], block.weight(name), group.inputs)
        compressed = apply_in_runs(layer, run.steps[name])
        done[name] = compressed.expression()
        run.rows.append(_row(run.steps[name], layer, compressed, group.held_out))
    group.inputs.derived.clear()  # factors that only this group's linears could share
    return done


@torch.no_grad()
def _stored(job: Job, block: Block, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a block learned outside compressed linears, in the types that the dense model stores; the block goes on with
    that."""
    found = {}
    for name, value in learned.items():
        if name in job.source.tensors:
            found[name] = value.to(job.source.read(name).dtype)
            block.model.get_parameter(name).copy_(found[name])
    return found


def _layer(job: Job, name: str, group: str, weight: Tensor, inputs: Moments) -> Layer:
    """The layer as methods see it; layers that read the same input get the same seed."""
    target = weight
    if inputs.cross is not None and inputs.outer is not None:
        target = weight + job.recipe.asymmetric * (weight @ _to_dense_outputs(inputs, inputs.outer, inputs.cross))
    seed = f"{job.recipe.seed}/{group}"
    return Layer(name, target, Dense(target.to(torch.bfloat16)), inputs, seed)


def _to_dense_outputs(inputs: Moments, outer: Tensor, cross: Tensor) -> Tensor:
    """D `[in, in]` for which W + W D, on the inputs seen, comes closest to W's outputs on the dense model's inputs.

    (C - H) inverse(H) with C = X_dense^T X and H = X^T X (GPTAQ, arXiv 2504.02692); one for all layers that read X.
    """

    def compute() -> Tensor:
        hessian = damped(outer.double(), TARGET_DAMPING)
        return torch.linalg.solve(hessian, (cross - outer).double(), left=False).float()

    return inputs.memo("to_dense_outputs", compute)


def _row(steps: tuple[StepConfig, ...], layer: Layer, compressed: Layer, held_out: Moments | None) -> LayerReport:
    stored = compressed.expression()
    value = dense(stored)
    error = relative_error(layer.weight, value, layer.inputs)
    if not error < float("inf"):
        raise NumericsError(f"{layer.name}: the compressed weight holds NaN or Inf; choose other steps for it")
    size = (layer.weight.shape[0], layer.weight.shape[1])
    return LayerReport(
        name=layer.name,
        shape=size,
        steps=tuple(s.method for s in steps),
        bpw=bits(stored) / prod(size),
        error=error,
        error_heldout=None if held_out is None else relative_error(layer.weight, value, held_out),
        fallback="; ".join(compressed.notes) or None,
        stored=describe(stored),
    )


def _write_rest(job: Job, layouts: dict[str, Layout], writer: Writer) -> None:
    """Everything but the decoder blocks: embeddings, head, config, tokenizer, and what else the dense folder holds."""
    inside = tuple(f"{layout.path}." for layout in job.arch.blocks)
    tables = {f"{name}.weight" for name in job.tables}
    rest = [name for name in job.source.tensors if not name.startswith(inside) and name not in tables]
    writer.add({name: job.source.read(name) for name in rest})
    config = job.source.config_entries()
    config["quantization_config"] = table_entry(layouts) | {"versions": reports.versions()}
    writer.write("config.json", json.dumps(config, indent=1))
    copy_companions(job.source.folder, writer.folder)


def copy_companions(folder: Path, target: Path) -> None:
    """Copies what lies beside a model's weights: tokenizer, chat template, generation config, licence."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix in COMPANIONS or path.name.startswith("LICENSE")) and path.name not in OURS:
            shutil.copyfile(path, target / path.name)


COMPANIONS = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
OURS = {"config.json", INDEX, MANIFEST, reports.FILE, reports.SCORES}


def _report(run: _Run, tokens: CalibrationTokens | None, size: int, seconds: float) -> Report:
    job, rows = run.job, run.rows
    fallbacks = [row.name for row in rows if row.fallback]
    if len(fallbacks) > job.recipe.gates.max_fallback_layers * len(rows):
        raise NumericsError(
            f"{len(fallbacks)} of {len(rows)} layers needed a fallback, {fallbacks[0]} first "
            f"({next(row.fallback for row in rows if row.fallback)}); calibrate on more text"
        )
    linears = [row for row in rows if row.name not in job.tables]
    weights = sum(prod(row.shape) for row in linears)
    return Report(
        model=job.source.name,
        revision=job.source.revision,
        recipe=job.recipe.name,
        dense_bytes=job.source.bytes,
        bytes=size,
        bpw=sum(row.bpw * prod(row.shape) for row in linears) / weights,
        model_bpw=size * 8 / job.source.parameters,
        parameters=job.source.parameters,
        seconds=seconds,
        peak_memory_bytes=peak_memory(),
        calibration=None if tokens is None else tokens.report(),
        layers=tuple(rows),
        warnings=(*warnings(job), *_searched_elsewhere(run)),
        base_model=job.source.hub_id,
        license=job.source.license,
        versions=reports.versions(),
        blocks=run.blocks,
        fused=tuple(run.fused),
    )


def _searched_elsewhere(run: _Run) -> tuple[str, ...]:
    """A sentence where trellises were searched on another device than asked for."""
    if searched_there(run.device) or not any("trellis" in row.stored for row in run.rows):
        return ()
    return (
        f"trellises were searched on the CPU, not on {run.device}, since that takes an NVIDIA GPU and Triton; if there "
        'is such a GPU, run pip install "llmcompress[gpu]"',
    )


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss would start from what the launching process held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
