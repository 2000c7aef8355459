"""Narrower models: units that do nothing go without a trace, and the result loads in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import InputError, LLMCompressError, RecipeError
from llmcompress.models.dense.families import FAMILIES, LLAMA, architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import open_source
from llmcompress.models.files import file_names
from llmcompress.surgery.units import Part, plan_narrowing
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny, tiny, tiny_tokenizer

IDS = torch.arange(24)[None] * 7 % 256
WITH_HEADS = sorted(name for name, family in FAMILIES.items() if family.groups is LLAMA)
IDLE = {"neurons": (1, 16, 40), "kv_heads": (0,)}


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file."""
    (tmp_path / "text.txt").write_text("".join(f"{number} sacks of corn. " for number in range(600)))
    return str(tmp_path / "text.txt")


def logits(folder: Path) -> Tensor:
    """The logits of a checkpoint that transformers loads in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = [model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)
    found: Tensor = model(IDS, use_cache=False).logits
    return found


@torch.no_grad()
def with_idle(family: str, folder: Path, *parts: Part) -> Path:
    """Save a tiny model in which `IDLE` units are read by nobody: those columns of what would read them are zero."""
    model = tiny(family)
    source = open_source(locate(save_tiny(family, folder)))
    arch = architecture(source.config, source.skeleton())
    asked = {"neurons": {"neurons": 45}, "kv_heads": {"kv_heads": 1}}
    plan = plan_narrowing(source, arch, **{name: value for part in parts for name, value in asked[part].items()})
    for cuts in plan.cuts:
        for cut in cuts:
            weight = model.get_submodule(cut.consumer.name).get_parameter("weight")
            columns = [unit * cut.size + i for unit in IDLE[cut.part] for i in range(cut.size)]
            (weight.T if cut.consumer.transposed else weight)[:, columns] = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), {"llama", "phi3", "gpt2"}.__contains__))
def test_narrow_removes_idle_neurons_without_a_change(family: str, tmp_path: Path, text: str) -> None:
    whole = with_idle(family, tmp_path / "whole", "neurons")
    done = lc.narrow(whole, tmp_path / "slim", neurons=45, text=text, samples=8)
    stays = tuple(unit for unit in range(48) if unit not in IDLE["neurons"])
    assert {block.parts[0].kept for block in done.blocks} == {stays}
    assert done.bytes_after < done.bytes_before
    torch.testing.assert_close(logits(tmp_path / "slim"), logits(whole), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(WITH_HEADS, {"llama", "qwen3"}.__contains__))
def test_narrow_removes_idle_heads_without_a_change(family: str, tmp_path: Path, text: str) -> None:
    whole = with_idle(family, tmp_path / "whole", "kv_heads", "neurons")
    done = lc.narrow(whole, tmp_path / "slim", neurons=45, kv_heads=1, text=text, samples=8)
    assert [part.kept for part in done.blocks[0].parts if part.part == "kv_heads"] == [(1,)]
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (2, 1, 45)
    torch.testing.assert_close(logits(tmp_path / "slim"), logits(whole), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_damage_is_that_of_the_written_block(tmp_path: Path, text: str) -> None:
    """Of the first block, whose inputs are the dense model's: by its outputs in both checkpoints."""
    whole = save_tiny("llama", tmp_path / "whole")
    done = lc.narrow(whole, tmp_path / "slim", neurons=24, kv_heads=1, text=text, samples=9)
    ids = tokens_held_out(whole, text)
    first = []
    for folder in (whole, tmp_path / "slim"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        first.append(model(ids, output_hidden_states=True).hidden_states[1].double())
    change = (first[1] - first[0]).square().sum(-1) / first[0].square().sum(-1)
    assert done.blocks[0].damage == pytest.approx(float(change.mean()), rel=1e-3) and done.blocks[0].damage > 1e-3


def tokens_held_out(folder: Path, text: str) -> Tensor:
    """The sequence that a run with nine samples holds out."""
    from llmcompress.data.calibration import calibration_tokens

    source = open_source(locate(folder))
    asked = lc.Calibration(dataset=text, samples=9, length=64, held_out=1)
    found: Tensor = calibration_tokens(asked, source.tokenizer(), source.load, source.config).sequences[-1:]
    return found


def test_narrow_without_output_reports_the_same(tmp_path: Path, text: str) -> None:
    whole = save_tiny("llama", tmp_path / "whole")
    how: dict[str, Any] = {"neurons": 0.5, "kv_heads": 1, "text": text, "samples": 8}
    plan = lc.narrow(whole, **how)
    done = lc.narrow(whole, tmp_path / "slim", **how)
    assert plan.blocks == done.blocks and plan.bytes_after == done.bytes_after
    stored = json.loads((tmp_path / "slim" / file_names.NARROWED).read_text())
    assert stored == json.loads(json.dumps(done.to_json() | {"output": None}))
    weights = sum(path.stat().st_size for path in (tmp_path / "slim").glob("*.safetensors"))
    assert 0 < weights - done.bytes_after < 8192  # names and shapes


@pytest.mark.parametrize(
    "family, asked, error, sentence",
    [
        ("llama", {}, RecipeError, "nothing is to become narrower"),
        ("llama", {"neurons": 48}, RecipeError, "from 1 to 47, or a share below 1"),
        ("llama", {"neurons": 0}, RecipeError, "from 1 to 47"),
        ("llama", {"neurons": 7.5}, RecipeError, "from 1 to 47"),
        ("llama", {"kv_heads": 2}, RecipeError, "from 1 to 1"),
        ("llama", {"neurons": 24, "by": "norm"}, RecipeError, "choose one of energy, subset, random"),
        ("llama", {"neurons": 24, "samples": 1}, RecipeError, "leave none to judge on"),
        ("phi3", {"kv_heads": 1}, InputError, "heads of model type 'phi3' cannot go"),
        ("gpt2", {"kv_heads": 1}, InputError, "heads of model type 'gpt2' cannot go"),
    ],
)
def test_narrow_refuses_impossible_numbers(
    family: str, asked: dict[str, Any], error: type[LLMCompressError], sentence: str, tmp_path: Path, text: str
) -> None:
    folder = save_tiny(family, tmp_path / "whole")
    with pytest.raises(error, match=sentence):
        lc.narrow(folder, tmp_path / "slim", **({"text": text} | asked))
    assert not (tmp_path / "slim").exists()


def test_narrow_refuses_a_family_without_a_row(tmp_path: Path, text: str) -> None:
    folder = save_tiny("stablelm", tmp_path / "whole", **FAMILY_CONFIGS["llama"])
    with pytest.raises(InputError, match="not in the table of families"):
        lc.narrow(folder, tmp_path / "slim", neurons=24, text=text)


def test_narrow_command_shows_the_damage_and_writes_the_model(tmp_path: Path, text: str) -> None:
    folder = str(save_tiny("llama", tmp_path / "whole"))
    command = ["narrow", folder, "--neurons", "0.5", "--kv-heads", "1", "--text", text, "--samples", "8"]
    assert CliRunner().invoke(app, command).exit_code == 2
    shown = CliRunner().invoke(app, [*command, "--dry-run"])
    assert shown.exit_code == 0 and "neurons 48 -> 24 in every block" in shown.output
    assert "nothing was written" in shown.output
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "slim"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["after"] == {"kv_heads": 1, "neurons": 24}
    written = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "again")])
    told = f"next    llmcompress distill {tmp_path / 'again'} shortened -o MENDED --teacher {folder}\n"
    assert told in written.output
