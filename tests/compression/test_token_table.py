"""Token tables and output heads as expressions: one stored matrix for look-up and logits, decoded row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.errors import RecipeError
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.weight import modules
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedEmbedding, CompressedLinear
from tests.tiers import tiered, tiered_nightly
from tests.tiny import FAMILY_CONFIGS, save_tiny
from tests.zoo import save_zoo

RTN = [{"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}]
GPTQ = [{"method": "rotate"}, {"method": "gptq", "bits": 3}]
PRUNED = {"method": "magnitude", "pattern": "2:4"}
TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
IDS = torch.tensor([[1, 5, 200, 5, 263, 0, 77]])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return path


def recipe(text: Path | None, **tables: Any) -> dict[str, Any]:
    rules = [{"match": "*.0.*", "steps": RTN}]
    data = {} if text is None else {"calibration": {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}}
    return {"version": 1, "rules": rules, **data, **tables}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def with_matrices(dense_folder: Path, model: nn.Module) -> nn.Module:
    """The dense model holding the values of the compressed one's matrices."""
    plain = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
    for name, module in modules.compressed_modules(model).items():
        weight = plain.get_submodule(name).weight
        value = dense(module.expression())
        weight.data = value.T if type(plain.get_submodule(name)).__name__ == "Conv1D" else value
    return plain


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiered(FAMILY_CONFIGS, {"gemma2", "opt"}.__contains__))
def test_every_family_looks_up_and_reads_out_what_is_stored(family: str, tied: bool, tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "dense", tie_word_embeddings=tied)
    asked = recipe(None, embeddings=RTN, **({} if tied else {"head": RTN}))
    result = lc.compress(source, asked, tmp_path / "out")
    model = result.model
    arch = architecture(model.config, resolve(str(source)).skeleton())
    assert isinstance(model.get_submodule(arch.embedding), CompressedEmbedding)
    assert isinstance(model.get_submodule(arch.head), CompressedLinear)
    assert {arch.embedding} <= {row.name for row in result.report.layers}
    expected = logits(with_matrices(source, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with lc.decoded(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    stored = [key for path in (tmp_path / "out").glob("*.safetensors") for key in tensors(path)]
    assert len(stored) == len(set(stored)) and (not tied or not any(key.startswith(arch.head) for key in stored))


@pytest.mark.parametrize("family", ["mamba", *tiered(["mamba2", "falcon_mamba", "xlstm"], "xlstm".__eq__)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_its_model_casts_to_stays_dense(family: str, tied: bool, tmp_path: Path) -> None:
    """These models cast hidden states to the dtype of the head's weight, which a payload of bytes has not."""
    source = save_zoo(family, tmp_path / "dense", tie_word_embeddings=tied)
    result = lc.compress(source, recipe(None, embeddings=RTN), tmp_path / "out")
    model = result.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear) and isinstance(table, CompressedEmbedding) != (table.weight is head.weight)
    assert any("must stay dense: the model casts its inputs" in warning for warning in result.report.warnings)
    torch.testing.assert_close(logits(model), logits(with_matrices(source, model)), rtol=1e-4, atol=1e-4)


def tensors(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.slow
def test_a_tied_table_is_saved_moved_and_cast(tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    model = lc.compress(source, recipe(text, embeddings=GPTQ), tmp_path / "out").model
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), before)
    assert [key for key in tensors(tmp_path / "again" / "model.safetensors") if key.startswith("lm_head")] == []
    again.tie_weights()
    assert torch.equal(logits(again), before) and again.lm_head.weight is again.model.embed_tokens.weight
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.model.embed_tokens(IDS).dtype == torch.bfloat16 == half(IDS).logits.dtype
    assert half.to(torch.float32).model.embed_tokens(IDS).dtype == torch.float32
    assert torch.equal(logits(half.to(torch.float32)).isfinite(), torch.ones_like(before, dtype=torch.bool))
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert torch.equal(logits(mapped), before)


def test_only_rows_looked_up_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=False)
    model = lc.compress(source, recipe(None, embeddings=RTN), tmp_path / "out").model
    decoded: list[int] = []
    found = modules.rows
    monkeypatch.setattr(
        modules, "rows", lambda header, kept, chosen: decoded.append(len(chosen)) or found(header, kept, chosen)
    )
    logits(model)
    assert decoded == [IDS.unique().numel()]


@pytest.mark.parametrize("family", [*FAMILY_CONFIGS, "modernbert-decoder"])
def test_the_head_is_calibrated_on_what_it_reads(family: str, tmp_path: Path) -> None:
    """Walked with nothing swapped, the moments are those of the inputs that the dense model itself gives its head."""
    if family in FAMILY_CONFIGS:
        folder = save_tiny(family, tmp_path / "dense")
    else:  # it has layers between the last hidden states and the head
        kind: dict[str, Any] = {"model_type": family, "head": "AutoModelForCausalLM", "tie_word_embeddings": False}
        folder = save_zoo("modernbert", tmp_path / "dense", **kind)
    source = resolve(str(folder))
    arch = architecture(source.config, source.skeleton())
    ids = torch.randint(0, 256, (6, 16), generator=torch.Generator().manual_seed(0))
    name = arch.embedding if arch.tied else arch.head
    needs = {linear: frozenset({"outer"}) for linear in [*arch.linears(), name]}
    *_, last = walk(source, arch, ids, Statistics(needs=needs, cap=None), held_out=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids[:4])
    hook.remove()
    expected = Moments.of(seen[0].flatten(0, 1), frozenset({"outer"}))
    assert last.groups[0].names == (name,) and last.groups[0].inputs.tokens == 4 * 16
    torch.testing.assert_close(last.groups[0].inputs.outer, expected.outer, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_calibration_lowers_the_error_of_the_logits(tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    errors = {}
    for method in ("rtn", "gptq"):
        steps = [{"method": method, "bits": 2}]
        report = lc.compress(source, recipe(text, embeddings=steps), tmp_path / method).report
        [row] = [row for row in report.layers if row.name == "model.embed_tokens"]
        errors[method] = row.error_heldout
    assert errors["gptq"] < errors["rtn"]


def rows_of(report: Any) -> dict[str, tuple[tuple[str, ...], float]]:
    """Return the steps and bits of the token table and of the output head, as far as they were compressed."""
    names = ("model.embed_tokens", "lm_head")
    return {row.name: (row.steps, row.bpw) for row in report.layers if row.name in names}


@pytest.mark.slow
def test_embeddings_serve_a_head_of_its_own_and_a_table_without_inputs(tmp_path: Path, text: Path) -> None:
    """The table is what the same recipe by rtn gives, the head what it gives as the head's own steps."""
    source = save_tiny("llama", tmp_path / "dense")
    blind = [GPTQ[0], {"method": "rtn", "bits": 3}]
    asked = recipe(text, embeddings=GPTQ)
    both = lc.compress(source, asked, tmp_path / "both")
    apart = lc.compress(source, recipe(text, embeddings=blind, head=GPTQ), tmp_path / "apart")
    assert rows_of(both.report) == rows_of(apart.report) == rows_of(lc.plan(source, asked))
    steps = {name: steps for name, (steps, _) in rows_of(both.report).items()}
    assert steps == {"model.embed_tokens": ("rotate", "rtn"), "lm_head": ("rotate", "gptq")}
    assert len({bpw for _, bpw in rows_of(both.report).values()}) == 1
    assert torch.equal(logits(both.model), logits(apart.model))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8"])
def test_floats_have_a_sibling_that_needs_no_inputs(format: str, tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    found = rows_of(lc.plan(source, recipe(text, embeddings=[{"method": "gptq", "format": format}])))
    assert found["model.embed_tokens"] == (("mxfp",), found["lm_head"][1])


def test_the_head_has_the_last_word(tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense")
    kept = recipe(text, embeddings=GPTQ)
    kept["rules"] = [{"match": "lm_head", "steps": []}, *kept["rules"]]
    for asked in (kept, recipe(text, embeddings=GPTQ, head=[])):
        assert rows_of(lc.plan(source, asked)).keys() == {"model.embed_tokens"}
    other = recipe(text, embeddings=GPTQ, head=RTN)
    assert rows_of(lc.plan(source, other))["lm_head"][0] == ("rtn",)


def test_a_table_and_a_head_of_their_own_have_steps_of_their_own(tmp_path: Path, text: Path) -> None:
    """One matrix for both has those of embeddings."""
    coarse = [{"method": "rtn", "bits": 2}]
    asked = recipe(text, embeddings=GPTQ, table=coarse, head=RTN)
    apart, one = (save_tiny("llama", tmp_path / str(tied), tie_word_embeddings=tied) for tied in (False, True))
    assert {name: steps for name, (steps, _) in rows_of(lc.plan(apart, asked)).items()} == {
        "model.embed_tokens": ("rtn",),
        "lm_head": ("rtn",),
    }
    assert rows_of(lc.plan(apart, recipe(text, table=coarse))).keys() == {"model.embed_tokens"}
    assert rows_of(lc.plan(apart, recipe(text, embeddings=GPTQ, table=[]))).keys() == {"lm_head"}
    assert rows_of(lc.plan(one, asked)) == rows_of(lc.plan(one, recipe(text, embeddings=GPTQ)))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_stays_dense_is_said_with_the_setting_that_helps(tied: bool, tmp_path: Path, text: Path) -> None:
    """The setting is tried, and nothing is said after it."""
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=tied, hidden_size=64, intermediate_size=96)
    asked = recipe(text) | {"rules": [{"match": "*", "steps": RTN}]}
    for said in (lc.plan(source, asked).warnings, lc.compress(source, asked, tmp_path / "out").report.warnings):
        [line] = [warning for warning in said if "MB stay dense" in warning]
        assert ("model.embed_tokens, lm_head" in line) is not tied
        setting = line.split("--set '")[1].split("'")[0]
    assert not any("MB stay dense" in warning for warning in lc.plan(source, read_recipe(asked, [setting])).warnings)


def test_layers_that_stay_dense_are_said(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", hidden_size=64, intermediate_size=384)
    asked = {"version": 1, "rules": [{"match": "*.k_proj", "steps": RTN}]}
    [line] = [warning for warning in lc.plan(source, asked).warnings if "MB stay dense" in warning]
    assert "model.layers.0.self_attn.q_proj" in line and line.endswith("; a rule that matches them compresses them")


def test_the_plan_counts_tables(tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    asked = recipe(text, embeddings=GPTQ)
    planned, report = lc.plan(source, asked), lc.compress(source, asked, tmp_path / "out").report
    assert [(row.name, row.bpw) for row in planned.layers] == [(row.name, row.bpw) for row in report.layers]
    assert planned.bpw == report.bpw and planned.bytes <= report.bytes
    assert not any("lm_head" in warning for warning in planned.warnings)
    without = lc.plan(source, recipe(text))
    assert without.bpw == planned.bpw and without.bytes > planned.bytes
    assert any("lm_head stays dense" in warning for warning in without.warnings)


@pytest.mark.parametrize(
    ("tables", "dense"),
    [
        ({}, {"model.embed_tokens", "lm_head"}),
        ({"head": GPTQ}, {"model.embed_tokens"}),
        ({"table": RTN}, {"lm_head"}),
        ({"embeddings": RTN}, set()),
    ],
)
def test_the_plan_names_each_table_that_stays_dense(
    tables: dict[str, Any], dense: set[str], tmp_path: Path, text: Path
) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=False)
    said = lc.plan(source, recipe(text, **tables)).warnings
    assert {name for name in ("model.embed_tokens", "lm_head") if f"{name} stays dense" in said} == dense


@pytest.mark.parametrize(
    "family, changes, tables, sentence",
    [
        ("llama", {"tie_word_embeddings": True}, {"head": RTN}, "is its token table; give its steps as embeddings"),
        (
            "llama",
            {"tie_word_embeddings": True},
            {"table": RTN},
            "table: the output head of .* is its token table; give",
        ),
        ("llama", {}, {"table": GPTQ}, "table: gptq learns from a layer's inputs, .* and steps such as rtn as table:"),
        (
            "llama",
            {},
            {"embeddings": [PRUNED | {"method": "wanda"}]},
            "which is not its output head, has none; give wand",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    family: str, changes: dict[str, Any], tables: dict[str, Any], sentence: str, tmp_path: Path, text: Path
) -> None:
    source = save_tiny(family, tmp_path / "dense", **changes)
    with pytest.raises(RecipeError, match=sentence):
        lc.plan(source, recipe(text, **tables))


@pytest.mark.parametrize(
    "steps",
    [
        [PRUNED],
        *tiered_nightly(
            [
                [{"method": "magnitude", "sparsity": 0.3}, {"method": "rtn", "bits": 3}],
                [{"method": "rotate"}, {"method": "pb_llm", "salient": 0.25, "group_size": 16}],
            ],
            lambda steps: True,
        ),
    ],
)
def test_pruned_tables_are_looked_up_and_read_out(steps: list[dict[str, Any]], tmp_path: Path, text: Path) -> None:
    source = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True)
    model = lc.compress(source, recipe(text, embeddings=steps), tmp_path / "out").model
    torch.testing.assert_close(logits(model), logits(with_matrices(source, model)), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_a_table_of_an_unknown_kind_is_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hashed(nn.Embedding):
        pass

    def skeleton(source: DenseModel) -> Any:
        model = plain(source)
        model.set_input_embeddings(Hashed(264, 32, device="meta"))
        return model

    plain = DenseModel.skeleton
    monkeypatch.setattr(DenseModel, "skeleton", skeleton)
    source = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RecipeError, match="a Hashed does more than look up rows and scale them; leave embeddings: out"):
        lc.plan(source, recipe(text, embeddings=RTN))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_head_that_differs_from_its_table_stays_apart(family: str, tmp_path: Path) -> None:
    """The config ties them, the file holds two: transformers keeps both, and so do the plan and the checkpoint."""
    source = save_tiny(family, tmp_path / "dense", tie_word_embeddings=True)
    stored = load_file(source / "model.safetensors")
    table = next(name for name in stored if name.endswith("embed_tokens.weight"))
    head = stored[table].flip(0) * 1.5
    save_file({**stored, "lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    result = lc.compress(source, recipe(None, embeddings=RTN, head=RTN), tmp_path / "out")
    assert any("they stay apart" in note for note in result.report.warnings)
    kept = dense(result.model.get_submodule("lm_head").expression())
    assert (kept - head.float()).norm() < 0.2 * head.float().norm()
    torch.testing.assert_close(logits(result.model), logits(with_matrices(source, result.model)), rtol=1e-4, atol=1e-4)
