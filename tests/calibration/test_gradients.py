"""The importance of tokens and rows, against the whole model's own backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmcompress as lc
from llmcompress.calibration import gradients, streaming
from llmcompress.calibration.gather import InputGroup, Statistics
from llmcompress.calibration.gradients import Importance, draw_labels, measure_importance
from llmcompress.calibration.walk import walk
from llmcompress.cli import stages
from llmcompress.cli.terminal import Terminal
from llmcompress.compression.job import gradient_importance, prepare
from llmcompress.errors import InputError
from llmcompress.methods.layer import Layer, apply, step
from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.block_search import TrellisStreams
from llmcompress.models.dense.experts import Experts, experts_of, holder, unfuse
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.recipe.read import read_recipe
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense
from llmcompress.weight.trellis import Trellis
from tests.lockstep import in_lockstep
from tests.tiers import tiered
from tests.tiny import save_tiny
from tests.zoo import save_any, save_zoo, text_for_calibration

RTN = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]}
TRELLIS = [{"match": "*", "steps": [{"method": "trellis", "memory": 8}, {"method": "refine", "passes": 1}]}]
FAMILIES = ["llama", "gpt2", "gemma2", "opt", "gpt_neox", "phi3", "mixtral", "mamba2", "bert", "falcon_h1", "qwen2_moe"]
FAST = {"llama", "gpt2", "mixtral"}


def sequences(count: int = 3) -> Tensor:
    return torch.randint(3, 250, (count, 24), generator=torch.Generator().manual_seed(1))


def opened(place: Path) -> tuple[Any, Architecture]:
    job = prepare(resolve(place), read_recipe(RTN))
    return job.source, job.arch


def whole_backward(place: Path, arch: Architecture, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The squared gradients of each linear by token and by row, summed over the other, from torch's own backward."""
    model = load_model(locate(str(place)))
    unfuse(model)
    experts = experts_of(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, linear: nn.Module, routed: Experts | None, row: int) -> Any:
        def seen(_: nn.Module, __: Any, output: Tensor) -> None:
            places = None if routed is None else routed.tokens

            def read(gradient: Tensor) -> None:
                squares = gradient.double().square().flatten(0, -2)
                by_token, by_row = found.setdefault(
                    name, (torch.zeros(tokens.shape, dtype=torch.double), torch.zeros(squares.shape[1]).double())
                )
                each = torch.zeros(tokens.shape[1], dtype=torch.double)
                each.index_add_(0, torch.arange(tokens.shape[1]) if places is None else places, squares.mean(1))
                by_token[row] += each
                by_row.add_(squares.sum(0))

            output.register_hook(read)

        return linear.register_forward_hook(seen)

    for row, ids in enumerate(tokens):
        handles = []
        for name in arch.linears():
            path = holder(name, experts)
            handles.append(watch(name, model.get_submodule(name), None if path is None else experts[path], row))
        table = model.get_input_embeddings()
        assert isinstance(table, nn.Module)
        with torch.enable_grad():
            table.requires_grad_(True)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            labels = draw_labels(logits.detach().softmax(-1), generator(0, "labels", *ids.tolist()))
            (-logits.log_softmax(-1).gather(1, labels)).sum().backward()
        for handle in handles:
            handle.remove()
    return found


def relative(total: Tensor) -> Tensor:
    return total / total.mean()


@pytest.mark.parametrize("family", tiered(FAMILIES, FAST.__contains__))
def test_it_is_that_of_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture, token importance is that of all experts that read the token."""
    monkeypatch.setattr(gradients, "TOKENS", 48)  # two sequences at a time
    place = save_any(family, tmp_path / "model")
    source, arch = opened(place)
    found = measure_importance(source, arch, sequences())
    expected = whole_backward(place, arch, sequences())
    merged: dict[str, Tensor] = {}
    for name, (by_token, by_row) in expected.items():
        torch.testing.assert_close(found.rows[name], relative(by_row).float(), rtol=2e-3, atol=2e-4)
        key = name if name in found.tokens else gradients.NUMBER.sub(r"\1", name)
        merged[key] = merged.get(key, torch.zeros(1).double()) + by_token
    assert merged.keys() == found.tokens.keys()
    for key, total in merged.items():
        torch.testing.assert_close(found.tokens[key], relative(total).float(), rtol=2e-3, atol=2e-4)
    assert all(torch.equal(value, torch.ones_like(value)) for name, value in found.rows.items() if name not in expected)


def test_the_pass_is_shown_block_by_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHORT", 0.0)
    source, arch = opened(save_any("llama", tmp_path / "model"))
    with Terminal():
        measure_importance(source, arch, sequences())
    assert "gradient 7/7 ..." in capsys.readouterr().err, "two blocks, forwards and backwards, and three predictions"
    with Terminal(quiet=True):
        measure_importance(source, arch, sequences())
    assert not capsys.readouterr().err


def test_a_large_vocabulary_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, arch = opened(save_any("gemma2", tmp_path / "model"))
    whole = measure_importance(source, arch, sequences())
    monkeypatch.setattr(streaming, "LOGITS", 1)
    monkeypatch.setattr(streaming, "STEP", 10)  # of 24 positions
    parts = measure_importance(source, arch, sequences())
    for name, shares in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], shares, rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_by_their_probabilities() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    labels = draw_labels(shares.expand(20000, 5), torch.Generator().manual_seed(0))
    assert labels.shape == (20000, 1)
    found = torch.bincount(labels[:, 0], minlength=5) / len(labels)
    torch.testing.assert_close(found, shares, rtol=0, atol=0.015)  # four standard errors
    assert not found[shares == 0].any()


def test_sequences_do_not_depend_on_each_other(tmp_path: Path) -> None:
    """Labels are drawn for each sequence by itself, so processes that share them out draw the same ones."""
    source, arch = opened(save_tiny("llama", tmp_path / "model"))
    together, alone = measure_importance(source, arch, sequences()), measure_importance(source, arch, sequences()[:1])
    for name, shares in together.tokens.items():
        torch.testing.assert_close(relative(shares[:1]), relative(alone.tokens[name]), rtol=1e-4, atol=1e-5)


def test_it_returns_from_the_disk(tmp_path: Path) -> None:
    source, arch = opened(save_any("mixtral", tmp_path / "model"))
    found = measure_importance(source, arch, sequences())
    again = Importance.from_tensors(found.tensors())
    assert again.tokens.keys() == found.tokens.keys() and again.rows.keys() == found.rows.keys()
    assert all(torch.equal(value, again.tokens[name]) for name, value in found.tokens.items())


def test_linears_that_their_model_casts_to_stay_dense(tmp_path: Path) -> None:
    """Inputs of the indexer's weights are cast to the dtype of that weight, which a payload of bytes has not."""
    indexer = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "num_key_value_heads": 4}
    place = save_zoo("deepseek_v3", tmp_path / "model", model_type="deepseek_v32", **indexer)
    job = prepare(resolve(place), read_recipe({"version": 1, "calibration": None, "rules": RTN["rules"]}))
    names = {name.rpartition(".")[2] for name in job.arch.linears() if ".indexer." in name}
    assert names == {"wq_b", "wk"}
    assert any(name.endswith("indexer.weights_proj.weight") for name in job.arch.other)


def test_tokens_of_linears_without_gradients_count_alike(tmp_path: Path) -> None:
    """The indexers of DeepSeek-V3.2 choose what tokens look at, without a gradient."""
    indexer = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "num_key_value_heads": 4}
    source, arch = opened(save_zoo("deepseek_v3", tmp_path, model_type="deepseek_v32", **indexer))
    importance = measure_importance(source, arch, sequences())
    groups = [tuple(linear.name for linear in group) for block in arch.blocks for group in block.groups]
    alone = [names for names in groups if all(".indexer." in name for name in names)]
    assert alone and all(torch.equal(importance.token_weights(names, 0.1), torch.ones(3, 24)) for names in alone)
    others = [importance.token_weights(names, 0.1) for names in groups if names not in alone]
    assert all(weights.shape == (3, 24) and len(weights.unique()) > 1 for weights in others)


def test_a_model_without_predictions_is_refused(tmp_path: Path) -> None:
    place = save_any("bert", tmp_path / "model")
    source, arch = opened(place)
    source.config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(InputError, match=r"does not predict tokens.*set token_weights\.by to norm"):
        measure_importance(source, arch, sequences())


def test_moments_weigh_tokens_by_it(tmp_path: Path) -> None:
    """Each group of linears has weights of its own: the mean of its linears'."""
    source, arch = opened(save_tiny("llama", tmp_path / "model"))
    found = measure_importance(source, arch, sequences(4))
    config = TokenWeights(by="gradient", minimum=0.1, rows=True)

    def gathered(**arguments: Any) -> list[InputGroup]:
        statistics = Statistics(frozenset({"outer"}), cap=None, **arguments)
        blocks = walk(source, arch, sequences(4), statistics, held_out=1)
        return [group for block in blocks for group in block.groups]

    def outers(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        changed = Importance({name: change(value) for name, value in found.tokens.items()}, found.rows)
        groups = gathered(weights=TokenWeights(by="gradient", minimum=1e-9), importance=changed)
        return [
            each.outer for group in groups for each in (group.inputs, group.held_out) if each and each.outer is not None
        ]

    alike = [each.outer for group in gathered() for each in (group.inputs, group.held_out) if each]
    changed = outers(torch.ones_like), outers(torch.clone), outers(lambda value: 30 - value.clamp_max(30))
    for plain, ones, weighed, rest in zip(alike, *changed, strict=True):
        assert plain is not None and not torch.allclose(weighed, plain, rtol=1e-2)
        torch.testing.assert_close(ones, plain)
        torch.testing.assert_close(weighed + rest, 30 * plain, rtol=1e-4, atol=1e-4)
    for group in gathered(weights=config, importance=found):
        weights = 0.1 + 0.9 * torch.stack([found.tokens[name].clamp_max(30) for name in group.names]).mean(0)
        assert group.inputs.tokens == pytest.approx(float(weights[:3].sum()), rel=1e-5)
        assert group.rows.keys() == set(group.names)
        assert all(torch.equal(group.rows[name], found.rows[name].clamp(0.05, 20)) for name in group.names)


@pytest.mark.parametrize("method", ["trellis", "refine"])
def test_rows_that_count_more_have_smaller_errors(method: str) -> None:
    """A stream of a trellis goes down the rows, so their errors are traded by what they count."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=draw)
    inputs = Moments.of(torch.randn(500, 32, generator=draw), frozenset({"outer"}))
    counts = torch.tensor([9.0, 1.0]).repeat(32)
    steps = [step({"method": "trellis", "bits": 2, "memory": 8, "run": 256})]
    if method == "refine":
        steps.append(step({"method": "refine"}))
    errors = []
    for rows in (None, counts):
        layer = Layer("linear", weight, Dense(weight.bfloat16()), inputs, rows=rows)
        lost = (weight - dense(apply(layer, steps).expression())).square().sum(1)
        errors.append((float(lost[0::2].sum()), float(lost[1::2].sum())))
    (heavy, light), (less, more) = errors
    assert less < 0.8 * heavy and more > light
    assert 9 * less + more < 9 * heavy + light


def test_equal_rows_change_nothing() -> None:
    trellis = Trellis(2, 1, 8, "table")
    scale, wanted = torch.rand(40, 1).half() + 0.5, torch.randn(1, 40)
    alike, ones = TrellisStreams(scale, 4, trellis, 16), TrellisStreams(scale, 4, trellis, 16, torch.ones(40))
    found = [wanted.clone(), wanted.clone()]
    for streams, values in zip((alike, ones), found, strict=True):
        streams.choose(0, values)
    assert torch.equal(*found) and not torch.equal(found[0], wanted)


@pytest.mark.slow
def test_a_recipe_compresses_by_it(tmp_path: Path) -> None:
    place = save_tiny("llama", tmp_path / "model")
    text = {"dataset": str(text_for_calibration(tmp_path)), "samples": 4, "length": 24, "held_out": 1}
    asked = {"version": 1, "calibration": text, "rules": TRELLIS}
    stored = {}
    kinds = {
        "alike": None,
        "tokens": {"by": "gradient"},
        "rows": {"by": "gradient", "rows": True},
        "norm": {"by": "norm"},
        "rows beside it": {"by": "norm", "rows": True},
    }
    for name, weights in kinds.items():
        done = lc.compress(place, {**asked, "token_weights": weights}, tmp_path / name)
        stored[name] = (done.folder / "model.safetensors").read_bytes()
    assert len(set(stored.values())) == len(kinds)


def test_rows_alone_read_beginnings_of_sequences_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens tell the weights of rows than those of tokens."""
    monkeypatch.setattr(gradients, "SAMPLE", (3, 16))
    weights = {"by": "norm", "rows": True}
    text = {"dataset": str(text_for_calibration(tmp_path)), "samples": 7, "length": 24, "held_out": 1}
    job = prepare(
        resolve(save_tiny("llama", tmp_path / "model")),
        read_recipe({**RTN, "calibration": text, "token_weights": weights, "compute": "float32"}),
    )
    tokens = sequences(7)
    importance = gradient_importance(job, tokens, torch.device("cpu"))
    assert importance is not None
    expected = measure_importance(job.source, job.arch, tokens[[0, 2, 4], :16])
    assert all(torch.equal(rows, expected.rows[name]) for name, rows in importance.rows.items())
    mine = {0: tokens, 1: sequences(7).flip(0)}  # a process that measured its own alone still exchanges with others
    many = in_lockstep(2, lambda ranks: gradient_importance(job, mine[ranks.rank], torch.device("cpu"), ranks))
    assert all(each is not None and each.rows.keys() == importance.rows.keys() for each in many)
