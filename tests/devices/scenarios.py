"""Scenarios that `test_devices.py` runs on the CPU and on the stand-in for a GPU, in a process of its own; and
`scripts/gpu_check` on the CPU and on a GPU.

    python tests/devices/scenarios.py LIBRARY FOLDER ANSWERS KIND

A scenario takes a device and an empty folder and returns what came out, in numbers, texts and tensors. ANSWERS becomes
{scenario: what is wrong on the stand-in, or null}.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.data.generate import AnswerSampling
from llmcompress.data.self_data import Answering, answer
from llmcompress.distillation import requirements, setup
from llmcompress.distillation.run import distill
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.verify import verify
from llmcompress.losses.loss import loss_config, measure
from llmcompress.methods.layer import apply, relative_error, step
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.pipeline.frontier import frontier
from llmcompress.pipeline.frontier_inputs import budgets
from llmcompress.recipe.read import read_recipe
from llmcompress.surgery.block_choice import alike_blocks
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import dense, matmul
from llmcompress.weight.nodes import Weight, Zero
from tests.builders import every_node, gaussian, layer, random_nestings
from tests.compression.test_journal import SETTINGS
from tests.compression.test_journal import recipe as compression
from tests.devices.stand_in import NAME, register
from tests.distillation import miniature
from tests.losses import cases
from tests.methods.conformance.cases import SIZE, Step, calibration, spelled
from tests.methods.conformance.test_row_chunks import PIPELINES
from tests.tiny import FAMILY_CONFIGS, save_tiny

Scenario = Callable[[str, Path], Any]

EXACT = 0.0  # the kernels are the same
CLOSE = 0.1  # codes that lie between two others go either way by rounding, which spreads
ROUNDED = 1e-3  # other kernels sum in another order
LEAST = 1e-7  # single numbers may be near zero; by other kernels what is below ROUNDED is nothing but rounding
STUDENT: list[dict[str, Any]] = [
    {"match": "*.q_proj", "steps": [{"method": "gptq", "bits": "ternary", "group_size": 8}]},
    {"match": "*", "steps": [{"method": "rotate"}, {"method": "gptq", "bits": 2, "group_size": 8}]},
]
OPTIONS = [[{"method": "rtn", "bits": bits}] for bits in (2, 3, 4)]
CODES = {"rates": {"codes": 2e-2, "scales": 1e-2}, "latents": "teacher"}
CUT = {"scales", "codes", "phases", "cached"}  # distillations that are interrupted and resumed, too
COMPRESSIONS = ("attention", "tables", "awq", "fused rotation", "windows", "low rank")  # of the journal's tests
# name -> what the recipe says of a distillation
DISTILLATIONS: dict[str, dict[str, Any]] = {
    "scales": {},
    "bfloat16": {"compute": "bfloat16"},
    "codes": CODES | {"freezing": {"momentum": 0.4, "threshold": 0.5}, "estimator": "reste"},
    "median scales": {"rates": {"codes": 2e-2}, "latents": "teacher", "scales": "median"},
    "terms": {"rates": {"factors": 1e-2, "norms": 1e-3}, "adapt": {"rank": 2, "factor_bits": 4}},
    "phases": CODES | {"phases": [{"kind": "blockwise"}, {"kind": "end_to_end"}]},
    "cached": {"teacher": {"kind": "cached", "k": 8}},
    "teacher of 8 bits": CODES | {"teacher": {"bits": 8}},
    "cached teacher of 8 bits": {"teacher": {"bits": 8, "kind": "cached", "k": 8}},
    "checkpointing": {"checkpointing": True},
    "states": {
        "rates": {"scales": 1e-2, "projections": 1e-3},
        "losses": [
            {"of": {"loss": "forward_kl"}},
            {"of": {"loss": "hidden"}},
            {"of": {"loss": "minilm"}, "layers": [1]},
            {"of": {"loss": "ofa"}, "exits": [1]},
        ],
    },
    "taid": {"losses": [{"of": {"loss": "taid"}}]},
    "mixture": {"mixture": {"reweight": "ddk", "every": 2, "sequences": 2}},
}


def moved(value: Any, device: str) -> Any:
    """The same with its tensors on `device`; a dict, of what was derived from them, is empty."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    if isinstance(value, dict):
        return {}
    return tuple(moved(each, device) for each in value) if isinstance(value, tuple) else value


def of_method(pipeline: list[Step], device: str, out: Path) -> Any:
    """A layer after some steps."""
    given = moved(layer(gaussian(*SIZE), calibration(SIZE[1])), device)
    found = apply(given, [step(arguments) for arguments in pipeline]).expression()
    kind = torch.device(device).type
    assert all(tensor.device.type == kind for tensor in encode(found)[1].values()), "parts of it went elsewhere"
    return [dense(found), relative_error(given.weight, found, given.inputs)]


def of_nodes(nodes: list[Weight], device: str, out: Path) -> Any:
    """Every question about expressions."""
    found = []
    for node in (moved(node, device) for node in nodes):
        if not isinstance(node, Zero):  # which comes out on the CPU if nobody says where it goes
            found.append(dense(decode(*encode(node))))
        found.append(matmul(torch.ones(2, dense(node).shape[1], device=device), node))
    return found


def of_loss(arguments: dict[str, Any], device: str, out: Path) -> Any:
    """A loss and its gradient."""
    asked, given = loss_config(arguments), moved(cases.random_predictions(dtype=torch.float32), device)
    given = replace(given, student=given.student.detach().requires_grad_())
    total, count = measure(given, asked, asked.start())
    return [total.detach(), count, *torch.autograd.grad(total, [given.student])]


def of_compression(place: Path, more: Mapping[str, Any], device: str, out: Path) -> Any:
    """Return the errors in the report. An interrupted run must leave what a whole one does."""
    asked = compression(place, **{"compute": "float32"} | more)
    run = partial(lc.compress, place / "untied", asked, device=device)
    whole = run(out / "whole")
    if device != "cpu":
        _check_cut(run, out, 1)
    return [row.error for row in whole.report.layers]


def of_family(place: Path, family: str, device: str, out: Path) -> Any:
    """Return the errors in the report of a family's model, and how much that model writes."""
    asked = compression(place, compute="float32", rules=STUDENT[1:])
    done = lc.compress(place / family, asked, out / "small", device=device)
    model = AutoModelForCausalLM.from_pretrained(done.folder).to(device)
    written = model.generate(torch.arange(4, 9, device=device)[None], max_new_tokens=4, do_sample=False)
    return [[row.error for row in done.report.layers], written.shape[1]]


def of_target(place: Path, damage: str, device: str, out: Path) -> Any:
    """Return the predicted and the measured KL of a model of a given size."""
    target = {"target": {"bpw": 3.5}, "damage": damage, "rules": [], "options": OPTIONS, "compute": "float32"}
    done = lc.compress(place / "dense", compression(place, **target), out / "small", device=device)
    assert done.allocation is not None
    return [done.allocation["predicted_kl"], done.allocation["measured_kl"]]


def of_frontier(place: Path, device: str, out: Path) -> Any:
    """The scores of every size."""
    asked = read_recipe(compression(place, target={"bpw": 3}, rules=[], options=OPTIONS, compute="float32"))
    protocol = Protocol(text=place / "text.txt", windows=2, length=32)
    found = frontier(place / "dense", [asked], budgets("2.5,3.5", None), out / "sizes", protocol, device=device)
    return [[point["perplexity"], point["kl"]] for point in found["series"][0]["points"]]


def of_distillation(place: Path, name: str, device: str, out: Path) -> Any:
    """Return the measurements. An interrupted run must leave what a whole one does."""
    more = DISTILLATIONS[name]
    if "mixture" in more:
        more = {"data": [miniature.recipe(place)["data"] | {"name": domain} for domain in ("corn", "mill")], **more}
    asked = miniature.recipe(place, **{"steps": 4, "save_every": 1, "evaluate_every": 4} | more)
    run = partial(distill, place / "small", place / "dense", asked, device=device)
    whole = run(out / "whole")
    if device != "cpu" and name in CUT:
        _check_cut(run, out, 2)
    return [[entry["kl"], entry["perplexity"]] for entry in whole.history]


def of_adapter(place: Path, device: str, out: Path) -> Any:
    """The loss of PEFT's adapter before and after a step, and what the model says once it is part of the weights."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "small"), lora).to(device)
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=1e-2)
    ids, losses = torch.arange(24, device=device)[None], []
    for _ in range(2):
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    with torch.no_grad():
        return [float(losses[0]), float(losses[1]), lc.fold(adapted.eval())(ids).logits]


def of_scores(place: Path, device: str, out: Path) -> Any:
    """Perplexities and distances, from every command that measures."""
    protocol = Protocol(text=place / "text.txt", windows=2, length=32)
    scored = lc.score(place / "small", protocol, against=str(place / "dense"), device=device)
    compared = lc.compare([place / "dense", place / "small"], protocol, device=device)
    checked = verify(place / "small", str(place / "dense"), place / "text.txt", 2, 32, device=device)
    return [scored["perplexity"], scored["kl"], *(row["perplexity"] for row in compared["models"]), checked.kl]


def of_writing(place: Path, device: str, out: Path) -> Any:
    """Answers of a model, and which of its blocks are alike."""
    asked = Answering(str(place / "prompts.jsonl"), sampling=AnswerSampling(longest=6))
    done = answer(str(place / "untied"), asked, out / "answers.jsonl", device=device)
    alike = alike_blocks(place / "untied", 1, text=str(place / "text.txt"), device=device)
    return [done.prompts, list(alike.cosines)]


def _check_cut(run: Callable[..., Any], out: Path, after: int) -> None:
    """Raise AssertionError unless a run interrupted after `after` steps leaves what a whole one left in `whole`."""

    def stop(done: int, *_: Any) -> None:
        if done == after:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run(out / "cut", progress=stop)
        raise AssertionError(f"it ended before step {after}")
    run(out / "cut")
    assert _weights(out / "cut") == _weights(out / "whole"), "an interrupted run ends otherwise"


def _loaded(place: Place, bits: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """In place of a teacher that bitsandbytes quantized, for which it has no kernels on the stand-in."""
    model: Any = load_model(place, str(device), dtype).requires_grad_(False)
    return model


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def scenarios(place: Path, same_kernels: bool = True) -> Iterator[tuple[str, Scenario, float]]:
    """The name of each, what it does, and how far its numbers may be from the CPU's, in shares of them; farther where
    the device does not compute by the `same_kernels`."""

    def near(tolerance: float, otherwise: float = ROUNDED) -> float:
        return tolerance if same_kernels else max(tolerance, otherwise)

    for pipeline in PIPELINES:
        yield f"method {'+'.join(map(spelled, pipeline))}", partial(of_method, pipeline), near(EXACT, CLOSE)
    yield "nodes", partial(of_nodes, [*every_node(), *random_nestings(0, 100)]), near(EXACT)
    for arguments in cases.CASES:
        yield f"loss {cases.spelled(arguments)}", partial(of_loss, arguments), near(1e-6)
    for name in COMPRESSIONS:
        yield f"compress {name}", partial(of_compression, place, SETTINGS[name]), CLOSE
    for family in FAMILY_CONFIGS:
        yield f"family {family}", partial(of_family, place, family), CLOSE
    for damage in ("distortion", "kl"):
        yield f"target by {damage}", partial(of_target, place, damage), CLOSE
    yield "frontier", partial(of_frontier, place), CLOSE
    for name in DISTILLATIONS:
        yield f"distill {name}", partial(of_distillation, place, name), CLOSE
    yield "adapter", partial(of_adapter, place), near(1e-5)
    yield "scores", partial(of_scores, place), near(1e-4)
    yield "writing", partial(of_writing, place), near(1e-4)


def kind_of_scenario(name: str) -> str:
    """The first word of the name of a scenario that takes long; "short" for all others."""
    kind = name.split()[0]
    return kind if kind in ("compress", "family", "distill") else "short"


def prepare(place: Path) -> None:
    """Fills `place` with models, a student, texts and prompts."""
    miniature.make(place, STUDENT)
    for family in FAMILY_CONFIGS:
        save_tiny(family, place / family)
    save_tiny("llama", place / "untied", tie_word_embeddings=False)
    (place / "prompts.jsonl").write_text('{"text": "Why?"}\n{"text": "Who is there?"}\n')


def difference(expected: Any, found: Any, tolerance: float, least: float = LEAST) -> str | None:
    """Say how `found` differs from `expected`; None if it does not. Tensors smaller than `least` count as that size."""
    if isinstance(expected, Tensor):
        expected, found = expected.cpu(), found.cpu()
        off = float((found - expected).norm() / expected.norm().clamp_min(least))
        return None if off <= tolerance else f"off by {off:.1e}: {found} instead of {expected}"
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        each = [difference(*pair, tolerance, least) for pair in zip(expected, found, strict=True)]
        return next(filter(None, each), None)
    if isinstance(expected, float):
        same = math.isclose(expected, found, rel_tol=tolerance, abs_tol=1e-6)
        return None if same else f"{found} instead of {expected}"
    return None if expected == found else f"{found} instead of {expected}"


def without_bitsandbytes() -> None:
    """Let teachers that it would quantize stay as they are, whether it is there or not."""
    setup.load_quantized = _loaded
    requirements.check_bitsandbytes = lambda option: None


def wrong(scenario: Scenario, out: Path, tolerance: float, device: str = NAME) -> str | None:
    """Say what is wrong with a scenario on a device, by default the stand-in; None if nothing is."""
    here, there = out / "here", out / "there"
    for folder in (here, there):
        folder.mkdir(parents=True)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        expected = scenario("cpu", here)
        AcceleratorState._reset_state(reset_partial_state=True)
        return difference(expected, scenario(device, there), tolerance, LEAST if device in (NAME, "cpu") else ROUNDED)
    except Exception:  # noqa: BLE001 (whatever it is, the test says it)
        return traceback.format_exc()


if __name__ == "__main__":
    library, place, answers = map(Path, sys.argv[1:4])
    register(library)
    without_bitsandbytes()
    prepare(place)
    found = {
        name: wrong(run, place / "out" / str(number), near)
        for number, (name, run, near) in enumerate(scenarios(place))
        if kind_of_scenario(name) == sys.argv[4]
    }
    answers.write_text(json.dumps(found))
