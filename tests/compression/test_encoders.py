"""Encoders, classifiers and bodies without a head: one walk, the model's own class, refusals where tokens are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llmcompress as lc
from llmcompress.calibration.walk import walk
from llmcompress.errors import InputError
from llmcompress.formats.model_card import card
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears
from tests.tiers import tiered
from tests.zoo import ENCODERS, save_zoo, text_for_calibration

IDS = torch.arange(3, 27)[None]
FAST = ("deberta-v2", "bert_classifier")
FAMILIES = tiered(ENCODERS, FAST.__contains__, slow=[*ENCODERS][::2].__contains__)
HALF = pytest.mark.parametrize("family", FAMILIES)


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    """Every linear of every block in 4 bits."""
    calibration = {"dataset": str(text_for_calibration(place)), "samples": 4, "length": 32, "held_out": 1}
    steps = [{"method": "gptq", "bits": 4, "group_size": 16}]
    return {"version": 1, "calibration": calibration, "rules": [{"match": "*", "steps": steps}]} | more


def outputs(model: Any) -> Tensor:
    """Return what a model says of a few tokens: logits, or hidden states of a body."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS)[0]
    return found


@HALF
def test_the_walk_reproduces_the_hidden_states(family: str, tmp_path: Path) -> None:
    source = resolve(save_zoo(family, tmp_path / "dense"))
    model = source.load()
    arch = architecture(source.config, source.skeleton())
    ids = torch.randint(3, 250, (5, 16), generator=torch.Generator().manual_seed(0))
    states = [block.hidden.clone() for block in walk(source, arch, ids, held_out=1)]
    with torch.no_grad():
        own = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == len(arch.blocks) == 2
    for mine, theirs in zip(states, own, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@HALF
def test_a_compressed_one_loads_with_its_own_class(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = save_zoo(family, tmp_path / "dense"), recipe(tmp_path)
    planned = lc.plan(source, asked)
    result = lc.compress(source, asked, tmp_path / "small")
    head = ENCODERS[family]["head"]
    assert result.report.auto_class == head
    assert [row.name for row in planned.layers] == [row.name for row in result.report.layers]
    assert all(row.error_heldout is not None and 0 < row.error_heldout < 0.2 for row in result.report.layers)
    loader = getattr(transformers, head)
    small, original = loader.from_pretrained(result.folder), loader.from_pretrained(source, dtype=torch.float32)
    assert type(small) is type(original)
    for name, linear in compressed_linears(small).items():  # the dense model with what is stored put into its place
        original.get_submodule(name).weight.data = dense(linear.expression())
    torch.testing.assert_close(outputs(small), outputs(original), rtol=1e-4, atol=1e-5)
    verified = lc.verify(result.folder, text=text_for_calibration(tmp_path), windows=2, length=32)
    assert verified.perplexity is None and verified.tokens == 64 and verified.layers == len(planned.layers)
    with monkeypatch.context() as patch:  # as large models are cut, between matrices that some families join
        patch.setattr("llmcompress.models.files.compressed.PART", 1000)
        lc.export(result.folder, tmp_path / "plain", "dense")
    plain, found = loader.from_pretrained(tmp_path / "plain", dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    torch.testing.assert_close(outputs(plain), outputs(original), rtol=5e-2, atol=5e-2)  # bfloat16


@pytest.mark.parametrize("family, longest", [("roberta", 127), ("mpnet", 126), ("bert", 128)])
def test_the_longest_sequence_leaves_out_positions_of_padding(family: str, longest: int, tmp_path: Path) -> None:
    """Padding is token 0 of these tiny models, but always 1 of MPNet."""
    asked = recipe(tmp_path)
    del asked["calibration"]["length"]
    result = lc.compress(save_zoo(family, tmp_path / "dense"), asked, tmp_path / "small")
    assert result.report.calibration is not None and result.report.calibration["length"] == longest


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier, `dense`, and the same in fewer bits, `small`."""
    place = tmp_path_factory.mktemp("classifier")
    lc.compress(save_zoo("bert_classifier", place / "dense"), recipe(place), place / "small")
    return place


def test_what_asks_for_the_next_token_is_refused(classifier: Path, tmp_path: Path) -> None:
    source, small = classifier / "dense", classifier / "small"
    lesson = {"version": 1, "data": recipe(tmp_path)["calibration"], "rates": {"scales": 1e-3}, "steps": 1, "batch": 2}
    protocol = lc.Protocol(text_for_calibration(tmp_path), 1, 32)
    uses = {
        "scoring": lambda: lc.score(small, protocol),
        "distilling": lambda: lc.distill(small, source, lesson, tmp_path / "out"),
        "dropping blocks": lambda: lc.drop_blocks(source, [0], tmp_path / "out"),
        "narrowing": lambda: lc.narrow(source, tmp_path / "out", neurons=0.5),
        "the export to gguf": lambda: lc.export(small, tmp_path / "out", "gguf"),
        "measuring a distance": lambda: lc.verify(small, str(source), protocol.text, 1, 32),
        "target:": lambda: lc.compress(source, recipe(tmp_path, target={"bpw": 4.0}, rules=[]), tmp_path / "out"),
        "embeddings:": lambda: lc.plan(source, recipe(tmp_path, embeddings=[{"method": "rtn", "bits": 8}])),
        "fuse:": lambda: lc.plan(source, recipe(tmp_path, fuse={"awq": True})),
        "calibration by dataset: self": lambda: lc.plan(source, recipe(tmp_path, calibration={"dataset": "self"})),
    }
    for doing, use in uses.items():
        with pytest.raises(InputError, match=f"^{doing}.*BertForSequenceClassification does not") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_its_card_names_class_and_task(classifier: Path) -> None:
    text = card(lc.read(classifier / "small"), "me/small", "version: 1")
    assert "import AutoModelForSequenceClassification, AutoTokenizer" in text
    assert "pipeline_tag: text-classification" in text


@pytest.mark.slow
def test_blocks_learn_while_they_are_compressed(classifier: Path, tmp_path: Path) -> None:
    tuned = lc.compress(classifier / "dense", recipe(tmp_path, reconstruct={"steps": 4}), tmp_path / "small")
    assert tuned.report.blocks
    assert load_model(locate(tuned.folder)).config.num_labels == 3


def test_without_architectures_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = save_zoo("distilbert", tmp_path / "dense")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"architectures"', '"strange"'))
    with pytest.raises(InputError, match="names no architectures"):
        resolve(folder)
