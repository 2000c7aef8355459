"""Windows of two blocks that learn together, overlapping: what the walk keeps, what is stored, and when."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, Execution, walk
from llmcompress.cli.app import app
from llmcompress.compression.run_files import FINISHED
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.checkpoint import CHECKPOINT
from llmcompress.models.files.tensor_files import part_file
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.weight.modules import compressed_linears
from tests.calibration.test_walk import block_outputs, sequences
from tests.distillation.miniature import TEXT
from tests.distillation.test_reconstruct import RULES, SCALES, block_errors, recipe
from tests.tiny import save_tiny, tiny

DEPTH = 4
PATHS = [f"model.layers.{index}" for index in range(DEPTH)]
OUTER = frozenset({"outer"})
FACTOR = 1.25


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, and a text."""
    folder = tmp_path_factory.mktemp("windows")
    save_tiny("llama", folder / "dense", num_hidden_layers=DEPTH, tie_word_embeddings=False)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


@torch.no_grad()
def _change(module: nn.Module) -> None:
    """A change that may come to a block more than once."""
    for parameter in module.parameters():
        parameter.mul_(FACTOR)


def _loaded(module: nn.Module) -> bool:
    return all(not parameter.is_meta for parameter in module.parameters())


def test_a_block_may_change_until_the_next_one_is_done(place: Path) -> None:
    """Hidden states are those of a model whose blocks have changed twice, the last two of them once."""
    source = resolve(str(place / "dense"))
    arch, tokens = architecture(source.config, source.skeleton()), sequences()
    plain = tiny("llama", num_hidden_layers=DEPTH)
    block: Block | None = None
    for block in walk(source, arch, tokens, Statistics(needs=OUTER), Execution(batch_size=2), held_out=2, window=2):
        dense = block_outputs(tiny("llama", num_hidden_layers=DEPTH), arch, tokens)
        assert block.wanted is not None
        torch.testing.assert_close(block.wanted, dense[block.index])
        seen = block_outputs(plain, arch, tokens)
        if block.index:
            torch.testing.assert_close(block.hidden, seen[block.index - 1])
        assert (block.before is None) == (block.index == 0)
        if block.before is not None and block.before.run is not None:
            assert block.before.path == PATHS[block.index - 1] and block.before.before is None
            torch.testing.assert_close(block.before.run(block.before.hidden[:2]), block.hidden[:2])
            _change(block.before.module)
            _change(plain.get_submodule(block.before.path))
        _change(block.module)
        _change(plain.get_submodule(block.path))
    assert block is not None
    torch.testing.assert_close(block.hidden, block_outputs(plain, arch, tokens)[-1])


def test_two_blocks_are_in_memory_at_a_time(place: Path) -> None:
    source = resolve(str(place / "dense"))
    arch = architecture(source.config, source.skeleton())
    model = None
    for block in walk(source, arch, sequences(), Statistics(needs=OUTER), held_out=2, window=2):
        model = block.model
        loaded = [path for path in PATHS if _loaded(model.get_submodule(path))]
        assert loaded == PATHS[max(0, block.index - 1) : block.index + 1]
    assert model is not None and not any(_loaded(model.get_submodule(path)) for path in PATHS)


@pytest.mark.slow
def test_reported_errors_equal_those_of_the_checkpoint(place: Path, tmp_path: Path) -> None:
    """Of the last block; others have learned for the next one since. The head comes after them."""
    head: dict[str, Any] = {"head": [{"method": "rtn", "bits": 4}]}
    plain = lc.compress(place / "dense", recipe(place, None), tmp_path / "plain")
    asked = recipe(place, {"rates": SCALES | {"weights": 3e-3}, "window": 2, "steps": 12}, **head)
    found = lc.compress(place / "dense", asked, tmp_path / "tuned")
    blocks = found.report.blocks
    assert [entry["window"] for entry in blocks.values()] == [PATHS[max(0, i - 1) : i + 1] for i in range(DEPTH)]
    assert list(blocks) == PATHS and all(entry["after"] <= entry["before"] for entry in blocks.values())
    assert sum(entry["step"] > 0 for entry in blocks.values()) > DEPTH // 2
    assert "lm_head" in compressed_linears(found.model)
    after, before = block_errors(place, found.folder), block_errors(place, plain.folder)
    assert blocks[PATHS[-1]]["after"] == pytest.approx(after[-1], rel=0.02), "norms are rounded"
    assert after[-1] < 0.99 * before[-1]
    verify(found.folder, text=place / "text.txt", length=16)


@pytest.mark.slow
def test_a_block_learns_again_for_the_next_one(place: Path, tmp_path: Path) -> None:
    """A checkpoint does not store what a block learned alone. The window ends nearer to the dense model."""
    asked = {"rates": SCALES, "steps": 12}
    one, two = (
        lc.compress(place / "dense", recipe(place, asked | {"window": size}), tmp_path / str(size)) for size in (1, 2)
    )
    alone, together = (compressed_linears(found.model) for found in (one, two))
    first = [name for name in alone if name.startswith(PATHS[0])]
    assert first and any(not torch.equal(alone[name].W_q, together[name].W_q) for name in first)
    assert two.report.blocks[PATHS[0]] == one.report.blocks[PATHS[0]], "the first block has nothing before it"
    assert block_errors(place, two.folder)[1] < block_errors(place, one.folder)[1]


@pytest.mark.slow
def test_learning_at_tiny_rates_changes_nothing(place: Path, tmp_path: Path) -> None:
    """At rates too small for float16, windows of two leave the files that blocks alone leave."""
    asked = [{"rates": {"scales": 1e-12}, "window": size, "steps": 2} for size in (1, 2)]
    one, two = (
        lc.compress(place / "dense", recipe(place, one), tmp_path / str(number)).folder
        for number, one in enumerate(asked)
    )
    assert list(_weights(one)) == list(_weights(two))


@pytest.mark.slow
def test_blocks_are_written_when_nothing_changes_them(place: Path, tmp_path: Path) -> None:
    """Beside them the one that waits for the next window lies in a file that goes again."""
    asked = recipe(place, {"rates": SCALES, "window": 2, "steps": 4, "evaluate_every": 2})

    def look(done: int, blocks: int, rate: float) -> None:
        staged = tmp_path / "out.partial"
        waiting = [] if done == blocks else [staged / FINISHED / f"open-{done - 1:05}.safetensors"]
        parts = [part_file(staged / CHECKPOINT, index) for index in range(done - len(waiting))]
        assert sorted(staged.rglob("*.safetensors")) == [*parts, *waiting]
        seen.append(done)

    seen: list[int] = []
    lc.compress(place / "dense", asked, tmp_path / "out", progress=look)
    assert seen == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_block_without_steps_stays_dense(place: Path, tmp_path: Path) -> None:
    """It opens no window of its own, and those beside it are stored all the same."""
    rules = [{"match": f"{PATHS[1]}.*", "steps": []}, *RULES]
    asked = recipe(place, {"rates": SCALES, "window": 2, "steps": 2}, rules=rules)
    found = lc.compress(place / "dense", asked, tmp_path / "out")
    assert list(found.report.blocks) == [path for path in PATHS if path != PATHS[1]]
    dense, kept = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "dense", found.folder))
    linear = f"{PATHS[1]}.mlp.up_proj.weight"
    assert torch.equal(kept.get_parameter(linear), dense.get_parameter(linear))
    assert len(compressed_linears(kept)) == 7 * (DEPTH - 1)


def test_the_plan_says_how_many_learn_together_and_takes_memory_for_both(place: Path, tmp_path: Path) -> None:
    plans = [lc.plan(place / "dense", recipe(place, {"rates": SCALES, "window": size})) for size in (1, 2)]
    assert plans[1].peak_memory_bytes > plans[0].peak_memory_bytes
    assert Reconstruction().window == 1, "what --tune does"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(place, {"rates": SCALES, "window": 2})))
    done = CliRunner().invoke(app, ["plan", str(place / "dense"), str(path)])
    assert done.exit_code == 0 and "every block in windows of 2, 24 steps each time" in done.output


def _weights(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield a checkpoint's tensors: file, name and bytes."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor: Tensor = file.get_tensor(name)
                yield path.name, name, tensor.contiguous().view(torch.uint8).numpy().tobytes()
