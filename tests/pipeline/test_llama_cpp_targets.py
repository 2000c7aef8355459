"""A target for llama.cpp: types by price, sizes of its own file, known before anything is written."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation import target_formats
from llmcompress.allocation.choices import Choices, find_choices
from llmcompress.allocation.gguf_sizes import Shape, Steps, gguf_type
from llmcompress.cli.app import app
from llmcompress.compression.job import prepare
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.export import export
from llmcompress.formats.gguf.head import FileOrigin, read_head
from llmcompress.formats.gguf.tensor_types import TensorType, exact_type
from llmcompress.methods.layer import apply, sketch, step
from llmcompress.methods.solvers.hessian import metric
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.file_names import ALLOCATION, RECIPE
from llmcompress.pipeline.engines import compress_for, plan_for
from llmcompress.recipe.read import read_recipe
from llmcompress.reporting import report as reports
from llmcompress.weight.expression import dense as decoded
from tests.builders import gaussian, layer
from tests.formats.gguf_files import byte_level, engine, gguf, largest_difference, run, tiny_llama
from tests.formats.test_gguf_families import CASES
from tests.tiers import one_in, tiered
from tests.tiny import save_tiny, tiny

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
FAST = (("llama", 0), ("qwen3_moe", 1))
PLAIN = {family: sizes for family, sizes in CASES.items() if family != "gpt2"}  # its linears are transposed
PAIRS = [(family, number) for family, sizes in PLAIN.items() for number in range(len(sizes))]
EVERYTHING = {
    "version": 1,
    "rules": [
        {"match": "*", "steps": [{"method": "gguf", "type": "IQ4_NL"}]},
    ],
    "embeddings": [{"method": "gguf", "type": "Q8_0"}],
}

TERMS = {8: ["*.mlp.*"], 4: ["*.q_proj"]}  # patterns by the rank of a term


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths blocks fill, and those of one matrix in a block superblocks; with a token table as head."""
    place = tmp_path_factory.mktemp("dense")
    more = {"max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.05}
    return tiny_llama(place, dtype=torch.bfloat16, **more, **SIZES)


def aimed(target: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = {"dataset": "builtin", "samples": 6, "length": 32, "held_out": 2}
    return {"version": 1, "name": "aimed", "calibration": text, "target": target, **more}


def choices(dense: Path, **more: Any) -> Choices:
    target = {"bytes": 10**9, "engine": "llama.cpp"}
    return find_choices(prepare(resolve(str(dense)), read_recipe(aimed(target, **more))))


def expected_type(name: str, size: Shape, steps: Steps) -> TensorType:
    return gguf_type(sketch(name, size, steps), steps)


def types(file: Path) -> dict[str, tuple[str, int]]:
    """The type and the bytes of each tensor of a file."""
    return {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("case", tiered(PAIRS, FAST.__contains__, slow=one_in(3, PAIRS)))
def test_the_plan_has_the_size_of_the_file(case: tuple[str, int], tmp_path: Path) -> None:
    """To the byte, in every family: head, vocabulary, dense tensors, stacks of experts."""
    family, number = case
    tiny(family, **CASES[family][number]).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    byte_level(("words",)).save_pretrained(tmp_path / "dense")
    recipe = read_recipe(EVERYTHING)
    planned = plan_for("llama.cpp", tmp_path / "dense", recipe)
    report = compress_for("llama.cpp", tmp_path / "dense", recipe, tmp_path / "out").report
    written = types(tmp_path / "out" / "model.gguf")
    assert planned.bytes == report.bytes == (tmp_path / "out" / "model.gguf").stat().st_size
    assert planned.bpw == pytest.approx(report.bpw) and planned.model_bpw == pytest.approx(report.model_bpw)
    compressed = [size for kind, size in written.values() if kind in ("IQ4_NL", "Q8_0")]
    assert sum(row.bits for row in planned.layers) == 8 * sum(compressed)


@pytest.mark.parametrize("target", [None, pytest.param({"kl": 0.5}, marks=pytest.mark.slow)])
def test_terms_of_a_distillation_count_in_every_size(
    target: dict[str, Any] | None, dense: Path, tmp_path: Path
) -> None:
    """In a file beside the model, in float32, all of the largest rank."""
    text = {"dataset": "builtin", "samples": 6, "length": 32, "held_out": 2}
    phases = [{"kind": "end_to_end", "adapt": {"rank": rank, "match": match}} for rank, match in TERMS.items()]
    distill = {"phases": phases, "rates": {"factors": 1e-3}, "data": text, "steps": 2, "batch": 2, "micro_batch": 2}
    asked = EVERYTHING | {"calibration": text, "distill": distill}
    if target is not None:
        kinds = [[{"method": "gguf", "type": kind}] for kind in ("Q4_0", "Q8_0")]
        asked |= {"target": target, "rules": [], "options": kinds}
    planned = plan_for("llama.cpp", dense, read_recipe(asked))
    report = compress_for("llama.cpp", dense, read_recipe(asked), tmp_path / "out").report
    lora, main = types(tmp_path / "out" / "lora.gguf"), types(tmp_path / "out" / "model.gguf")
    packed = [size for kind, size in main.values() if kind not in ("F32", "BF16")]
    linears = sum(packed) - main["token_embd.weight"][1] + sum(size for _, size in lora.values())
    weights = sum(prod(row.shape) for row in report.layers if "layers" in row.name)
    assert report.bpw == pytest.approx(8 * linears / weights)
    added = [row for row in report.layers if "mlp" in row.name or "q_proj" in row.name]
    assert sum(size for _, size in lora.values()) == sum(4 * max(TERMS) * sum(row.shape) for row in added)
    assert all(f" + rank {8 if 'mlp' in row.name else 4} (float32 | float32)" in row.stored for row in added)
    assert sum("rank" in row.stored for row in report.layers) == len(added) == 8
    for place in (tmp_path / "out", tmp_path / "out" / "model.gguf"):
        verified = lc.verify(place, windows=2, length=32)
        assert verified.bytes == report.bytes and "without the low-rank terms of lora.gguf" in verified.notes[-1]
    if target is None:
        assert planned.bytes == report.bytes and planned.bpw == pytest.approx(report.bpw)


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"bpw": 4.9}, {"bytes": 300_000}, {"kl": 0.2}])
def test_types_are_chosen_up_to_the_size_and_written(target: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    recipe = read_recipe(aimed(target))
    planned = plan_for("llama.cpp", dense, recipe)
    result = compress_for("llama.cpp", dense, recipe, tmp_path / "out")
    file = tmp_path / "out" / "model.gguf"
    assert result.allocation is not None
    assert file.stat().st_size == result.report.bytes == result.allocation["predicted_bytes"]
    assert result.allocation["measured_bytes"] == result.report.bytes
    if "bytes" in target:
        assert 0.97 * target["bytes"] <= result.report.bytes <= target["bytes"]
        assert 0.97 * target["bytes"] <= planned.bytes <= target["bytes"]
    if "bpw" in target:
        assert 0.97 * target["bpw"] <= result.report.bpw <= target["bpw"]
    chosen = read_recipe(tmp_path / "out" / RECIPE)
    job = prepare(resolve(str(dense)), chosen)
    head = read_head(dense, job.source.config_entries(), FileOrigin("", None, None))
    written = types(file)
    for row in result.report.layers:
        kind = expected_type(row.name, row.shape, job.all_steps[row.name])
        assert written[head.model.name(f"{row.name}.weight")] == (kind.name, row.bpw * prod(row.shape) / 8)
        assert row.stored == kind.name
    assert len({kind for kind, _ in written.values()} - {"F32", "BF16"}) > 1


@engine
def test_llama_cpp_reads_what_a_target_chose(dense: Path, tmp_path: Path) -> None:
    recipe = read_recipe(aimed({"bytes": 300_000, "engine": "llama.cpp"}))
    made = lc.compress(dense, recipe, tmp_path / "ours").folder
    export(made, tmp_path / "theirs", "gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = [(number * 37) % 640 for number in range(1, 33)]
    assert largest_difference(run(tmp_path / "theirs"), model, ids, 640) < 0.25, "it rounds inputs to 8 bits"
    assert json.loads((made / ALLOCATION).read_text())["target"] == {"bytes": 300_000, "engine": "llama.cpp"}
    assert reports.read(made).recipe == "aimed"


@pytest.mark.slow
def test_a_sweep_counts_the_file_of_the_engine(dense: Path, tmp_path: Path) -> None:
    settings = [f"calibration.{key}" for key in ("samples=6", "length=32", "held_out=2")]
    words = ["frontier", str(dense), "--for", "llama.cpp", "--sizes", "300kB", "-o", str(tmp_path / "curve"), "--json"]
    words += ["--windows", "2", "--length", "32", *(word for setting in settings for word in ("--set", setting))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    [point] = json.loads(done.stdout)["series"][0]["points"]
    report = export(tmp_path / "curve" / point["folder"], tmp_path / "theirs", "gguf")
    assert 0.97 * 300_000 <= point["bytes"] == report.bytes_after <= 300_000


def test_every_matrix_has_the_types_that_its_width_bears(dense: Path) -> None:
    found = {matrix.name: matrix for matrix in choices(dense).matrices}
    offered = {
        name: [expected_type(name, matrix.shape, steps).name for steps in matrix.options]
        for name, matrix in found.items()
    }
    assert offered["model.layers.0.self_attn.q_proj"] == ["IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert {"IQ2_XXS", "IQ3_XXS", "IQ4_XS", "Q6_K"} < set(offered["model.layers.0.mlp.down_proj"])
    assert "Q8_0" in offered["model.embed_tokens"] and found["model.embed_tokens"].is_table
    assert all(len(kinds) == len(set(kinds)) for kinds in offered.values())


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("Q4_0", 64, "Q4_0"),
        ("Q4_K", 96, "Q5_0"),
        ("IQ4_NL", 64, "IQ4_NL"),
        ("IQ3_S", 96, "IQ4_NL"),
        ("IQ4_XS", 256, "IQ4_NL"),
        ("IQ2_S", 256, "IQ2_S"),
        ("TQ1_0", 256, "TQ1_0"),
    ],
)
def test_refine_keeps_the_type_that_sizes_are_counted_by(kind: str, width: int, expected: str) -> None:
    """And makes the weighted error less."""
    before = layer(gaussian(6, width, seed=1), gaussian(300, width, seed=2))
    filled = apply(before, [step({"method": "gguf", "type": kind})])
    refined = apply(filled, [step({"method": "refine"})])
    assert exact_type(refined.approx).name == expected
    steps = tuple(map(step, ({"method": "gguf", "type": kind}, {"method": "refine"})))
    assert expected_type("x", (6, width), steps).name == expected
    loss = metric(before.inputs, before.weight, 0.1)
    left = [before.weight - decoded(each.approx) for each in (filled, refined)]
    assert float(((left[1] @ loss) * left[1]).sum()) < float(((left[0] @ loss) * left[0]).sum())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"options": [[{"method": "gguf", "type": "Q3_K"}, {"method": "refine"}]]}, "options: llama.cpp does not"),
        ({"options": [[{"method": "gptq", "bits": 8}]]}, "fits when it is compressed with narrow_range: true"),
        (
            {"rules": [{"match": "*.q_proj", "steps": [{"method": "gptq", "bits": 4, "group_size": 16}]}]},
            "rules: llama",
        ),
        ({"options": [[{"method": "rotate"}, {"method": "trellis"}]]}, "is no single grid"),
    ],
)
def test_options_and_rules_that_no_type_holds_are_refused(more: dict[str, Any], sentence: str, dense: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        choices(dense, **more)


def test_sizes_that_cannot_be_reached_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="200,000 bytes cannot be reached, [0-9,]+ is the least"):
        plan_for("llama.cpp", dense, read_recipe(aimed({"bytes": 200_000})))
    with pytest.raises(RecipeError, match="llama.cpp has no form for a share of zeros"):
        plan_for("llama.cpp", dense, read_recipe(aimed({"sparsity": 0.5})))
    ragged = tiny_llama(tmp_path / "ragged", dtype=torch.bfloat16, **SIZES | {"intermediate_size": 80})
    with pytest.raises(RecipeError, match="multiplies no form of .*down_proj .*do not fill the width 80"):
        plan_for("llama.cpp", ragged, read_recipe(aimed({"bytes": 10**9})))


def test_a_model_is_checked_once_and_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a target, too: a check reads the whole tokenizer."""
    seen: list[str] = []
    check = target_formats.check_model
    monkeypatch.setattr(target_formats, "check_model", lambda *args: (seen.append(args[2]), check(*args)))
    recipe = read_recipe(aimed({"bpw": 4.9}))
    plan_for("llama.cpp", dense, recipe)
    assert seen == ["gguf"]
    bytewise = save_tiny("llama", tmp_path / "bytewise", **SIZES)
    with pytest.raises(InputError, match="merges nothing, which llama.cpp does not load"):
        compress_for("llama.cpp", bytewise, recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bytewise"]


def test_experts_have_one_type_and_are_not_chosen_for(tmp_path: Path) -> None:
    tiny("qwen3_moe", **CASES["qwen3_moe"][0]).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_level(("words",)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="llama.cpp holds all experts of a block in one type"):
        choices(tmp_path)
    rule = {"match": "*.experts.1.*", "steps": [{"method": "gguf", "type": "IQ4_NL"}]}
    with pytest.raises(RecipeError, match="and model.layers.0.mlp.experts.0.gate_proj and its .* IQ4_NL and no type"):
        plan_for("llama.cpp", tmp_path, read_recipe({"version": 1, "rules": [rule]}))
    rule = {"match": "*.experts.*", "steps": [{"method": "gguf", "type": "IQ4_NL"}]}
    left = choices(tmp_path, rules=[rule]).matrices
    assert left and not any("experts" in matrix.name for matrix in left)
