"""Dropped blocks: what is left equals the model with those blocks passed over, and loads in stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.calibration import streaming
from llmcompress.calibration.streaming import from_disk, in_memory
from llmcompress.cli.app import app
from llmcompress.errors import DiskError, InputError, MemoryLimitError, RecipeError
from llmcompress.models.dense.blocks import KEPT
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.surgery.block_choice import choose_blocks, path_damages, run_cosines, runs_of, search_blocks
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny, tiny, tiny_tokenizer

IDS = torch.arange(24)[None] * 7 % 256
WINDOWED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def four(family: str) -> dict[str, Any]:
    """The changes that give a tiny model four unlike blocks."""
    if family == "gpt2":
        return {"n_layer": 4}
    lists = {"smollm3": {"no_rope_layers": [1, 0, 1, 0]}}
    if "layer_types" in FAMILY_CONFIGS[family]:
        lists[family] = {"layer_types": WINDOWED}
    return {"num_hidden_layers": 4} | lists.get(family, {})


def blocks_in(model: Any) -> list[Any]:
    """The decoder blocks, found without the table of families."""
    return next(list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)


def written(folder: Path) -> Path:
    """A text file."""
    (folder / "text.txt").write_text("".join(f"{number} sacks of corn. " for number in range(400)))
    return folder / "text.txt"


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), {"llama", "phi3", "gpt2"}.__contains__))
def test_dropping_a_block_equals_skipping_it(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "whole", **four(family))
    lc.drop_blocks(tmp_path / "whole", [1], tmp_path / "short")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    blocks_in(whole)[1].forward = lambda hidden_states, *_, **__: hidden_states
    short: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "short", dtype=torch.float32)
    expected = whole(IDS, use_cache=False).logits
    torch.testing.assert_close(short(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    written = [short.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*written)


@pytest.mark.slow
def test_dropped_checkpoint_equals_one_built_without_llmcompress(tmp_path: Path) -> None:
    """By a program that knows nothing but transformers, and never llmcompress."""
    folder = save_tiny("llama", tmp_path / "whole", num_hidden_layers=4)
    done = lc.drop_blocks(folder, [2, 0], tmp_path / "short")
    assert (done.dropped, done.kept) == ((0, 2), (1, 3))
    stored = load_file(folder / "model.safetensors")
    places = {"model.layers.1.": "model.layers.0.", "model.layers.3.": "model.layers.1."}
    by_hand: dict[str, Tensor] = {}
    for name, value in stored.items():
        start = name[: len("model.layers.0.")]
        if not name.startswith("model.layers."):
            by_hand[name] = value
        elif start in places:
            by_hand[places[start] + name[len(start) :]] = value
    (tmp_path / "hand").mkdir()
    save_file(by_hand, tmp_path / "hand" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "hand" / "config.json").write_text(json.dumps(config))
    program = (
        "import sys, torch, transformers as t\n"
        "a, b = [t.AutoModelForCausalLM.from_pretrained(f) for f in sys.argv[1:]]\n"
        "ids = torch.arange(24)[None]\n"
        "assert a.state_dict().keys() == b.state_dict().keys() and torch.equal(a(ids).logits, b(ids).logits)\n"
        "assert 'llmcompress' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "short"), str(tmp_path / "hand")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "short" / name).read_text() == (folder / name).read_text()


def test_config_lists_kept_blocks_of_the_original_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "whole", num_hidden_layers=4)
    lc.drop_blocks(tmp_path / "whole", [1], tmp_path / "once")
    lc.drop_blocks(tmp_path / "once", [0], tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text())[KEPT] == [2, 3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    model.save_pretrained(tmp_path / "again")
    assert getattr(AutoModelForCausalLM.from_pretrained(tmp_path / "again").config, KEPT) == [2, 3]


def test_layer_patterns_become_lists(tmp_path: Path) -> None:
    """A config that says "every fourth block" means other blocks once one is gone."""
    folder = save_tiny("smollm3", tmp_path / "whole", num_hidden_layers=4, no_rope_layers=None)
    config = json.loads((folder / "config.json").read_text())
    del config["no_rope_layers"], config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    lc.drop_blocks(folder, [1], tmp_path / "short")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short").config
    assert again.no_rope_layers == [1, 1, 0] and len(again.layer_types) == 3


@pytest.mark.parametrize(
    "blocks, sentence",
    [
        ([4, 9], "has no block 4, 9; its blocks are 0 to 3"),
        ([-1], "has no block -1"),
        (range(4), "4 of the 4 blocks of .* cannot be dropped; name at least one, not all"),
        ([], "0 of the 4 blocks"),
    ],
)
def test_drop_blocks_refuses_impossible_blocks(blocks: Any, sentence: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "whole", num_hidden_layers=4)
    with pytest.raises(RecipeError, match=sentence):
        lc.drop_blocks(tmp_path / "whole", blocks, tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_drop_blocks_refuses_models_that_number_their_blocks(tmp_path: Path) -> None:
    save_tiny("olmo", tmp_path / "olmo", hidden_size=32, intermediate_size=48, num_hidden_layers=2, tokenizer=False)
    with pytest.raises(InputError, match="model type 'olmo' is not in the table of families"):
        lc.drop_blocks(tmp_path / "olmo", [0], tmp_path / "short")
    save_tiny("gpt2", tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match="scales each block's attention by the block's number"):
        lc.drop_blocks(tmp_path / "gpt2", [0], tmp_path / "short")
    with pytest.raises(DiskError, match="exists already"):
        lc.drop_blocks(save_tiny("llama", tmp_path / "llama"), [0], tmp_path / "gpt2")


# --- which blocks -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_run_cosines_equal_those_of_single_hidden_states() -> None:
    model: Any = tiny("llama", num_hidden_layers=4)
    ids = torch.arange(60).reshape(3, 20)
    states = list(model.model(ids, output_hidden_states=True).hidden_states)
    captured: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda *a: captured.append(a[2]))
    model(ids)
    handle.remove()
    states[-1] = captured[0]  # the library's last one has been through the final norm
    for count in (1, 3):
        found = run_cosines(model, ids, count)
        for first in range(5 - count):
            pairs = [(states[first][i, t], states[first + count][i, t]) for i in range(3) for t in range(20)]
            slow = sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / 60
            assert abs(float(found[first]) - slow) < 1e-5
    assert len(found) == 2


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), {"llama", "gpt2", "gemma2"}.__contains__))
def test_path_damages_are_the_kl_of_skipping_blocks(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model", **four(family))
    model = load_model(locate(tmp_path / "model"))
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    found = path_damages(in_memory(model), ids, [(2, 3), (0, 2), (0, 3), (0, 1, 2, 3)])
    assert float(found[3]) == pytest.approx(0, abs=1e-6)
    for place, gone in enumerate(((0, 1), (1, 3), (1, 2))):
        whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        wanted = whole(ids, use_cache=False).logits.double().log_softmax(-1)
        for number in gone:
            blocks_in(whole)[number].forward = lambda hidden_states, *_, **__: hidden_states
        given = whole(ids, use_cache=False).logits.double().log_softmax(-1)
        slow = float((wanted.exp() * (wanted - given)).sum(-1).mean())
        assert float(found[place]) == pytest.approx(slow, rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("step", [32, 8])  # of 20 positions
def test_path_damages_read_a_model_on_disk_and_its_logits_in_parts(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "model", **four("llama"))
    ids, paths = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0)), [(2, 3), (0, 1, 2, 3)]
    whole = path_damages(in_memory(load_model(locate(folder))), ids, paths)
    monkeypatch.setattr(streaming, "LOGITS", 1)
    monkeypatch.setattr(streaming, "STEP", step)
    found = path_damages(from_disk(resolve(str(folder)), torch.device("cpu")), ids, paths)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def with_idle_blocks(folder: Path) -> Path:
    """A tiny model of five blocks, of which 1 and 3 do nothing."""
    model: Any = tiny("llama", num_hidden_layers=5)
    for number in (1, 3):
        model.model.layers[number].self_attn.o_proj.weight.data.zero_()
        model.model.layers[number].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_least_damage_finds_idle_blocks(tmp_path: Path) -> None:
    tried: list[int] = []
    text = str(written(tmp_path))
    model = with_idle_blocks(tmp_path / "model")
    found = lc.least_damage(model, 2, text=text, progress=tried.append)
    assert found.blocks == (1, 3) and found.damage == pytest.approx(0, abs=1e-5)
    assert len(found.alone) == 5 and found.alone[1] == pytest.approx(0, abs=1e-5) and found.alone[0] > 1e-5
    assert tried == sorted(tried) and tried[-1] > 5
    with pytest.raises(RecipeError, match="5 of the 5 blocks"):
        lc.least_damage(model, 5, text=text)


def tried_by(damage: Callable[[frozenset[int]], float]) -> Callable[[list[frozenset[int]]], list[float]]:
    return lambda sets: [damage(gone) for gone in sets]


def test_search_blocks_tries_runs_greedy_sets_and_swaps() -> None:
    """Blocks alone cost their number; those that do each other's work, a run or three apart, cost more or less."""

    def of_a_run(gone: frozenset[int]) -> float:
        return sum(10 + index for index in gone) - (100 if gone >= {6, 7, 8} else 0)

    def after_swaps(gone: frozenset[int]) -> float:
        return sum(10 + index for index in gone) - (40 if gone >= {0, 5} else 0) - (20 if gone >= {0, 5, 8} else 0)

    assert search_blocks(3, 10, tried_by(lambda gone: sum(9 - index for index in gone))) == {7, 8, 9}
    assert search_blocks(3, 10, tried_by(of_a_run)) == {6, 7, 8}
    assert search_blocks(3, 10, tried_by(after_swaps)) == {0, 5, 8}
    assert search_blocks(1, 3, tried_by(lambda gone: abs(min(gone) - 1.0))) == {1}
    assert runs_of(2, 4) == [{0, 1}, {1, 2}, {2, 3}]


@pytest.mark.slow
def test_least_damage_is_never_worse_than_the_best_run(tmp_path: Path) -> None:
    found = lc.least_damage(with_idle_blocks(tmp_path / "model"), 3, text=str(written(tmp_path)))
    assert len(found.runs) == 3 and found.damage <= min(found.runs) and {1, 3} <= set(found.blocks)


@pytest.mark.slow
def test_drop_command_reports_the_damage(tmp_path: Path) -> None:
    model, text = with_idle_blocks(tmp_path / "model"), str(written(tmp_path))
    words = ["drop", str(model), "--count", "2", "--text", text, "--json", "-o"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "short"), "--by", "damage"])
    found = json.loads(done.stdout)
    assert found["dropped"] == [1, 3] and found["damage"] == pytest.approx(0, abs=1e-5)
    done = CliRunner().invoke(app, [*words, str(tmp_path / "run")])
    found = json.loads(done.stdout)
    assert found["dropped"][1] == found["dropped"][0] + 1 and found["damage"] is None
    done = CliRunner().invoke(app, [*words, str(tmp_path / "other"), "--by", "luck"])
    assert done.exit_code == 2 and not (tmp_path / "other").exists()


def test_alike_blocks_finds_idle_blocks(tmp_path: Path) -> None:
    model: Any = tiny("llama", num_hidden_layers=5)
    for number in (2, 3):
        model.model.layers[number].self_attn.o_proj.weight.data.zero_()
        model.model.layers[number].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    found = lc.alike_blocks(tmp_path / "model", 2, text=str(written(tmp_path)))
    assert found.blocks == (2, 3) and abs(found.cosine - 1) < 1e-6 and len(found.cosines) == 4
    with pytest.raises(RecipeError, match="5 of the 5 blocks"):
        lc.alike_blocks(tmp_path / "model", 5)


def test_a_model_that_does_not_fit_is_not_loaded_to_choose_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 1000)
    monkeypatch.setattr("llmcompress.surgery.block_choice.load_model", lambda *_: pytest.fail("loaded"))
    ways: list[Callable[..., object]] = [lc.alike_blocks, lc.least_damage]
    for choose in ways:
        with pytest.raises(MemoryLimitError, match="choosing blocks holds .*; take a larger machine"):
            choose(model, 1, text=str(written(tmp_path)))
        with pytest.raises(MemoryLimitError, match="writing calibration text holds .*; give another text"):
            choose(model, 1, text="self", device="cuda")


@pytest.mark.parametrize("words, numbers", [("2", (2,)), ("13-15", (13, 14, 15)), ("4, 7-8", (4, 7, 8))])
def test_choose_blocks_reads_numbers_and_ranges(words: str, numbers: tuple[int, ...]) -> None:
    assert choose_blocks("unread", words, None).blocks == numbers


@pytest.mark.parametrize("words, count", [("", None), ("4-2", None), ("a", None), ("1-", None), (None, None), ("1", 1)])
def test_choose_blocks_refuses_other_texts(words: str | None, count: int | None) -> None:
    with pytest.raises(RecipeError, match="such as 4,7-9|exactly one of them"):
        choose_blocks("unread", words, count)


def test_drop_command_names_the_dropped_blocks(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "whole", num_hidden_layers=4)
    words = ["drop", str(tmp_path / "whole"), "--blocks", "1-2", "-o", str(tmp_path / "short")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["kept"] == [0, 3]
    assert (tmp_path / "short" / "manifest.json").is_file()
    done = CliRunner().invoke(
        app, [*words[:2], "--count", "2", "--text", str(written(tmp_path)), "-o", str(tmp_path / "other")]
    )
    assert done.exit_code == 0 and "of the 4 blocks" in done.stdout
    done = CliRunner().invoke(app, [*words[:2], "--blocks", "7", "-o", str(tmp_path / "none")])
    assert done.exit_code == 2 and "its blocks are 0 to 3" in done.stderr
