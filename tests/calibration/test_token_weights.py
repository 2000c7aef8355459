"""Weights of tokens: attention from first principles and from transformers' own outputs, and moments weighed by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llmcompress as lc
from llmcompress.calibration.block_calls import embed
from llmcompress.calibration.blocks import BlockForward, in_batches, load
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.token_weights import QUERIES, AttentionUnknownError, received_attention, rescale
from llmcompress.calibration.walk import Block, Execution, InputGroup, walk
from llmcompress.data.calibration import calibration_tokens
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import relative_error
from llmcompress.methods.moments import STATISTICS, capped_weights
from llmcompress.models.dense.families import FAMILIES, Architecture, architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.recipe.calibration import Calibration, TokenWeights
from llmcompress.recipe.read import parse_recipe
from llmcompress.weight.modules import compressed_linears
from tests.builders import seeded
from tests.tiny import save_tiny, tiny

LENGTH = QUERIES + 13  # more than one run of queries
EVERYTHING = frozenset({"square", "outer"})
Opened = Callable[[str], tuple[DenseModel, Architecture]]
both = pytest.mark.parametrize("by", ["attention", "norm"])


def sequences(count: int = 4) -> Tensor:
    return torch.randint(0, 250, (count, LENGTH), generator=seeded(3))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Tiny models on disk, one per family."""
    made: dict[str, tuple[DenseModel, Architecture]] = {}

    def get(family: str) -> tuple[DenseModel, Architecture]:
        if family not in made:
            changes = {"hidden_size": 32, "n_layer": 2, "n_head": 4} if family == "bloom" else {}
            source = resolve(str(save_tiny(family, tmp_path_factory.mktemp(family), tokenizer=False, **changes)))
            made[family] = source, architecture(source.config, source.skeleton())
        return made[family]

    return get


def runs(
    source: DenseModel, arch: Architecture, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> list[tuple[BlockForward, Tensor]]:
    """Every dense block with its inputs."""
    model, batches = source.skeleton(), in_batches(len(tokens), 0, len(tokens))
    hidden, calls, _ = embed(model, source, arch, tokens, batches, torch.device("cpu"))
    found = []
    for index, layout in enumerate(arch.blocks):
        module = model.get_submodule(layout.path)
        load(module, layout.path, source, hidden.device)
        run = BlockForward(module, layout.path, calls, index, dtype)
        found.append((run, hidden))
        with torch.no_grad():
            hidden = run(hidden)
    return found


# --- attention received ----------------------------------------------------------------------------------------------


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions on `[sequences, heads, length, width]`, pair by pair (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    rate = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * rate
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)


def explicit(model: PreTrainedModel, index: int, hidden: Tensor) -> Tensor:
    """The attention that the tokens of a Llama block's inputs receive, from its matrices alone, in float64."""
    config, block = model.config, model.model.layers[index].double()
    hidden = hidden.double()
    normed = hidden * (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
    normed = normed * block.input_layernorm.weight
    width = config.hidden_size // config.num_attention_heads

    def heads(matrix: Tensor) -> Tensor:
        found = (normed @ matrix.T).unflatten(-1, (-1, width)).transpose(1, 2)
        return turned(found, config.rope_parameters["rope_theta"])

    query, key = heads(block.self_attn.q_proj.weight), heads(block.self_attn.k_proj.weight)
    received = torch.zeros(hidden.shape[:2], dtype=torch.float64)
    for head in range(config.num_attention_heads):
        other = head // (config.num_attention_heads // config.num_key_value_heads)
        for at in range(hidden.shape[1]):
            scores = (query[:, head, at, None] * key[:, other, : at + 1]).sum(-1) / width**0.5
            received[:, : at + 1] += scores.exp() / scores.exp().sum(-1, keepdim=True)
    return received


@torch.no_grad()
def test_attention_is_that_of_the_formula(opened: Opened) -> None:
    source, arch = opened("llama")
    for index, (run, hidden) in enumerate(runs(source, arch, sequences())):
        expected = explicit(tiny("llama"), index, hidden)
        found = received_attention(run, hidden, slice(None))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected[:, :-1], expected[:, 1:], rtol=0.05)  # tokens differ


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_transformers_puts_out(family: str, opened: Opened) -> None:
    """Softcaps, windows and biases included."""
    source, arch = opened(family)
    with torch.no_grad():
        shares = tiny(family, attn_implementation="eager")(sequences(), output_attentions=True).attentions
    for (run, hidden), expected in zip(runs(source, arch, sequences()), shares, strict=True):
        found = received_attention(run, hidden, slice(None))
        torch.testing.assert_close(found, expected.sum((1, 2)), rtol=1e-4, atol=1e-4)
        assert found.sum(1) == pytest.approx([LENGTH * expected.shape[1]] * len(found), rel=1e-4)


def test_attention_in_bfloat16_is_near_that_in_float32(opened: Opened) -> None:
    source, arch = opened("llama")
    rounded = runs(source, arch, sequences(), torch.bfloat16)
    for (run, hidden), (half, _) in zip(runs(source, arch, sequences()), rounded, strict=True):
        found = received_attention(half, hidden, slice(None))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, received_attention(run, hidden, slice(None)), rtol=0.05, atol=0.01)


def test_a_block_is_as_before_when_it_was_asked(opened: Opened) -> None:
    source, arch = opened("gemma2")
    for run, hidden in runs(source, arch, sequences()):
        with torch.no_grad():
            before, known = run(hidden), run.module.self_attn.config._attn_implementation
            received_attention(run, hidden, slice(None))
            assert run.module.self_attn.config._attn_implementation == known
            assert torch.equal(run(hidden), before)


def test_attention_past_the_interface_leaves_tokens_alike(opened: Opened) -> None:
    source, arch = opened("bloom")
    [(run, hidden), *_] = runs(source, arch, sequences())
    with pytest.raises(AttentionUnknownError, match=r"^transformer\.h\.0 does not tell how much attention its tokens"):
        received_attention(run, hidden, slice(None))

    def first(weights: TokenWeights | None) -> Block:
        return next(walk(source, arch, sequences(), Statistics(needs=EVERYTHING, weights=weights)))

    asked, alike, by_norm = (
        first(weights) for weights in (TokenWeights(by="attention"), None, TokenWeights(by="norm"))
    )
    assert [group.unweighed for block in (asked, alike, by_norm) for group in block.groups[:1]] == [True, False, False]
    for one, other, third in zip(asked.groups, alike.groups, by_norm.groups, strict=True):
        assert torch.equal(one.inputs.outer, other.inputs.outer)
        assert not torch.equal(one.inputs.outer, third.inputs.outer)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_linear_from_the_least_to_one() -> None:
    measure = torch.tensor([[3.0, 1.0, 2.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0, 7.0], [0.0, 1e4, 0.0, 1.0, 2.0]])
    expected = torch.tensor([[0.6, 0.2, 0.4, 1.0, 0.2], [1, 1, 1, 1, 1], [0.2, 1.0, 0.2, 0.20008, 0.20016]])
    torch.testing.assert_close(rescale(measure, 0.2), expected)
    assert torch.equal(rescale(measure, 1.0), torch.ones(3, 5))


# --- moments ---------------------------------------------------------------------------------------------------------


def gathered(
    opened: Opened, weights: TokenWeights | None, cap: float | None = 4.0, batch_size: int | None = None
) -> list[InputGroup]:
    source, arch = opened("llama")
    statistics, execution = Statistics(EVERYTHING, cap, weights), Execution(batch_size=batch_size)
    blocks = walk(source, arch, sequences(), statistics, execution, held_out=1)
    return [group for block in blocks for group in block.groups]


@torch.no_grad()
@both
@pytest.mark.parametrize("cap", [None, 0.5])
def test_every_moment_is_weighed(by: Literal["attention", "norm"], cap: float | None, opened: Opened) -> None:
    """Those of the dense stream and of held-out tokens too; the cap multiplies."""
    source, arch = opened("llama")
    config = TokenWeights(by=by, minimum=0.1)
    tokens = sequences()
    inputs: dict[str, Tensor] = {}
    measures: list[Tensor] = []
    for run, hidden in runs(source, arch, tokens):
        names = tuple(name for name in arch.linears() if name.startswith(f"{run.path}."))
        run(hidden, None, lambda name, x, _: inputs.__setitem__(name, x), names)
        measures.append(
            explicit(tiny("llama"), len(measures), hidden).float() if by == "attention" else hidden.norm(dim=-1)
        )
    blocks = walk(
        source,
        arch,
        tokens,
        Statistics(needs=STATISTICS, weights=config, cap=cap, cross=True),
        Execution(batch_size=2),
        held_out=1,
    )
    for block, measure in zip(blocks, measures, strict=True):
        for group in block.groups:
            x = inputs[group.names[0]]
            counts = rescale(measure, 0.1) * (1 if cap is None else capped_weights(x, cap))
            for moments, rows in ((group.inputs, slice(0, 3)), (group.held_out, slice(3, 4))):
                assert moments is not None and moments.outer is not None
                weighed = x[rows].double() * counts[rows, :, None].double()
                expected = (weighed.flatten(0, 1).T @ x[rows].flatten(0, 1).double()).float()
                close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
                torch.testing.assert_close(moments.outer, expected, **close)
                assert moments.tokens == pytest.approx(float(counts[rows].sum()), rel=1e-4)
                if moments.square is not None and moments.cross is not None:  # the prefix is the dense one
                    torch.testing.assert_close(moments.square, expected.diagonal(), **close)
                    torch.testing.assert_close(moments.cross, expected, **close)


@both
@pytest.mark.parametrize("cap", [None, 0.5])
def test_weights_of_one_change_no_bit(by: Literal["attention", "norm"], cap: float | None, opened: Opened) -> None:
    alike = gathered(opened, None, cap=cap)
    weighed = gathered(opened, TokenWeights(by=by, minimum=1), cap=cap)
    for one, other in zip(alike, weighed, strict=True):
        for a, b in ((one.inputs, other.inputs), (one.held_out, other.held_out)):
            assert a is not None and b is not None and a.outer is not None and b.outer is not None
            assert a.tokens == b.tokens and torch.equal(a.outer, b.outer)


@both
def test_weighed_moments_add(by: Literal["attention", "norm"], opened: Opened) -> None:
    """A sequence's weights do not depend on those beside it."""
    config = TokenWeights(by=by)
    for together, apart in zip(gathered(opened, config), gathered(opened, config, batch_size=1), strict=True):
        torch.testing.assert_close(together.inputs.outer, apart.inputs.outer, rtol=1e-4, atol=1e-4)
        assert together.inputs.tokens == pytest.approx(apart.inputs.tokens, rel=1e-5)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_recipe_weighs_up_loses_less(tmp_path: Path) -> None:
    """Each of three compressions is the best of all at the error that its own tokens count, which its report says."""
    folder = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number}. The mill by the river stands still in winter. " for number in range(120)))
    data = {"dataset": str(text), "samples": 18, "length": 32, "held_out": 2}
    source = resolve(str(folder))
    arch = architecture(source.config, source.skeleton())
    tokens = calibration_tokens(Calibration.model_validate(data), source.tokenizer())
    kinds = {by: by and TokenWeights(by=by, minimum=0.01) for by in ("attention", "norm", None)}
    rules = [{"match": "*", "steps": [{"method": "gptq", "bits": 3}]}]
    recipe = {"version": 1, "calibration": data, "prefix": "dense", "cap": None, "rules": rules}
    found, judges, reported = {}, {}, {}
    for by, weights in kinds.items():
        asked = {**recipe, "token_weights": weights and weights.model_dump()}
        done = lc.compress(folder, asked, tmp_path / str(by))
        found[by] = {name: layer.expression() for name, layer in compressed_linears(done.model).items()}
        reported[by] = {row.name: row.error for row in done.report.layers}
        walked = walk(
            source,
            arch,
            tokens.sequences,
            Statistics(needs=EVERYTHING, cap=None, weights=weights, prefix="dense"),
            held_out=2,
        )
        judges[by] = [
            (name, block.weight(name), group.inputs)
            for block in walked
            for group in block.groups
            for name in group.names
        ]
    for by, judge in judges.items():
        lost = {
            other: sum(relative_error(weight, layers[name], inputs) for name, weight, inputs in judge)
            for other, layers in found.items()
        }
        assert all(lost[by] < lost[other] for other in found if other != by), (by, lost)
        assert sum(reported[by][name] for name, *_ in judge) == pytest.approx(lost[by], rel=1e-2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "token_weights: {by: importance}",
            'by is "importance"; it must be "attention" or "norm" or "gradient"',
        ),
        ("token_weights: {by: norm, minimum: 0}", "token_weights: minimum is 0; it must be a number more than 0"),
        ("token_weights: {minimum: 0.1}", 'token_weights: the key "by" is missing'),
        ("token_weights: {by: norm}", "token_weights: there are no tokens to weigh; add calibration, or leave"),
    ],
)
def test_weights_that_make_no_sense_are_refused(line: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"version: 1\n{line}\nrules: [{{match: '*', steps: []}}]")
    assert sentence in str(caught.value)
