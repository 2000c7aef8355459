"""Blocks that take few steps for one token: they give what transformers gives, and stand aside for all else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import llmcompress as lc
from llmcompress.kernels import compiled_block, one_token
from llmcompress.kernels.accelerate import accelerate, plain
from llmcompress.kernels.compiled_block import CompiledBlock
from llmcompress.kernels.one_token import OneTokenBlock, TokenFacts, restore_blocks
from llmcompress.weight.modules import CompressedLinear, put
from tests.builders import grid
from tests.tiers import tiered
from tests.tiny import save_tiny

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
GRIDS = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]}
GRIDS |= {"calibration": None, "gates": {"kl": None, "perplexity_ratio": None}}
WHOLE: dict[str, dict[str, Any]] = {  # without windows, whose layers get masks
    "qwen2": {"layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None},
}
SHARP = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # attention that matters
PROMPT = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 250, (6, 1, 1), generator=torch.Generator().manual_seed(1))
MANY = torch.randint(3, 250, (20, 1, 1), generator=torch.Generator().manual_seed(2))


MADE: dict[str, Path] = {}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[OneTokenBlock]:
    """The blocks that took the short way, each time they did."""
    return counted(OneTokenBlock, "_run", monkeypatch)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[CompiledBlock]:
    """The compiled blocks that ran, each time they did."""
    return counted(CompiledBlock, "run", monkeypatch)


def counted(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note the objects whose method `name` is called."""
    taken: list[Any] = []
    run = getattr(kind, name)

    def count(self: Any, *given: Any) -> Tensor:
        taken.append(self)
        return run(self, *given)

    monkeypatch.setattr(kind, name, count)
    return taken


def compressed(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, recipe: dict[str, Any] = GRIDS, **changes: Any
) -> PreTrainedModel:
    """A compressed model, loaded; its checkpoint is written once, for the first test that reads it."""
    key = repr((family, recipe, changes))
    if key not in MADE:
        place = save_tiny(family, folder / "dense", **(SHARP if family != "gpt2" else {}), **changes)
        MADE[key] = lc.compress(place, recipe, folder / "small").folder
    model = AutoModelForCausalLM.from_pretrained(MADE[key]).to(dtype).eval()
    accelerate(model, "exact")
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, cache: Any = None, tokens: Tensor = MORE, ahead: int = 0, **more: Any) -> Tensor:
    """The model's predictions after a prompt and after each of some tokens, which may be `ahead` of their places."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=PROMPT.expand(tokens.shape[1], -1), past_key_values=cache, use_cache=True)
    each = []
    for place, ids in enumerate(tokens, PROMPT.shape[1] + ahead):
        places = {"position_ids": torch.tensor([[place]])} if ahead else {}
        each.append(model(input_ids=ids, past_key_values=cache, use_cache=True, **places, **more).logits)
    return torch.cat(each, 1).float()


def assert_near(short: Tensor, others: Tensor) -> None:
    """Assert that logits differ by the order of float32's sums alone: by at most 1e-5 of the largest logit."""
    torch.testing.assert_close(short, others, rtol=0, atol=1e-5 * float(others.abs().max()))


def assert_rounded_alike(short: Tensor, model: PreTrainedModel, read: Callable[..., Tensor] = logits) -> None:
    """Assert that logits are as near to those in float32 as the ones that `read` now gets of a model in bfloat16.

    And that this is near: a position that is off by one would be far outside.
    """
    exact = copy.deepcopy(model).float()
    with plain(exact):
        wanted, shifted = read(exact), read(exact, ahead=1)
    allowed = 1.5 * (read(model) - wanted).norm() + 1e-6
    assert (short - wanted).norm() <= allowed
    assert (shifted - wanted).norm() > 3 * allowed, "nothing here would show a mistake of attention"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiered(FAMILIES, "qwen2".__eq__))
def test_one_token_gives_what_transformers_gives(
    family: str, dtype: torch.dtype, tmp_path: Path, steps: list[OneTokenBlock], calls: list[CompiledBlock]
) -> None:
    model = compressed(family, tmp_path, dtype, **WHOLE.get(family, {}))
    short = logits(model)
    taken, others = (calls, steps) if dtype == torch.bfloat16 else (steps, calls)
    assert len(taken) == 2 * len(MORE) and not others
    blocks = restore_blocks(model)
    assert len(blocks) == 2
    if dtype == torch.float32:
        assert_near(short, logits(model))
    else:
        assert_rounded_alike(short, model)
    assert len(taken) == 2 * len(MORE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_are_those_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms and rotations alone, where nothing is summed up in another order: bit for bit."""
    model = compressed("llama", tmp_path, dtype)
    block: Any = model.get_submodule("model.layers.0")
    x = torch.randn(1, 1, 32).to(dtype)
    torch.testing.assert_close(
        one_token._normalize(block.input_layernorm, x), block.input_layernorm(x), rtol=1e-6, atol=0
    )
    positions = model.get_submodule("model.rotary_emb")(x, torch.tensor([[7]]))
    heads = torch.randn(6, 8).to(dtype)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    expected, _ = apply_rotary_pos_emb(heads.view(1, 6, 1, 8), heads.view(1, 6, 1, 8), *positions)
    assert torch.equal(one_token.TokenFacts().turn(heads, *positions), expected.view(6, 8))


TERMS: dict[str, list[dict[str, Any]]] = {
    "a sum": [{"method": "rtn", "bits": 3}, {"method": "svd", "rank": 3}],
    "a sum in a rotated basis": [{"method": "rotate"}, {"method": "rtn", "bits": 3}, {"method": "svd", "rank": 3}],
    "factors of few bits": [{"method": "rtn", "bits": 2}, {"method": "svd", "rank": 4, "factor_bits": 8}],
    "signs and columns": [{"method": "pb_llm", "structure": "columns"}],
    "signs and elements": [{"method": "pb_llm"}],
    "a stream": [{"method": "rotate"}, {"method": "trellis", "memory": 8, "code": "linear"}],
}


@pytest.mark.parametrize("terms", tiered(TERMS, {"a sum", "signs and columns", "a stream"}.__contains__))
def test_linears_of_several_terms_are_compiled(terms: str, tmp_path: Path, calls: list[CompiledBlock]) -> None:
    rules = [{"match": "*", "steps": TERMS[terms]}]
    text = {"dataset": "stdlib", "samples": 4, "length": 32, "held_out": 1}
    model = compressed("llama", tmp_path, torch.bfloat16, {**GRIDS, "rules": rules, "calibration": text})
    short = logits(model)
    assert len(calls) == 2 * len(MORE)
    restore_blocks(model)
    assert_rounded_alike(short, model)


@pytest.mark.parametrize("mode", ["exact", "auto", "int8"])
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_compiled_block_gives_what_its_steps_give(
    threads: int, mode: str, tmp_path: Path, calls: list[CompiledBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long enough for the cache to be moved to longer ones; `auto` is what everybody generates with."""
    monkeypatch.setattr(compiled_block, "LEAST_ROOM", 4)
    model = compressed("llama", tmp_path, torch.bfloat16)
    accelerate(model, mode)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        short = logits(model, tokens=MANY)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 2 * len(MANY)
    monkeypatch.setattr(OneTokenBlock, "_compiled_block", lambda *_: None)
    assert_rounded_alike(short, model, partial(logits, tokens=MANY))
    assert len(calls) == 2 * len(MANY)


BROADCAST: dict[str, dict[str, tuple[int, int]]] = {  # linears whose output torch broadcasts, of the width 32
    "a gate": {"mlp.gate_proj": (1, 32), "mlp.up_proj": (4096, 32), "mlp.down_proj": (32, 4096)},
    "an attention": {"self_attn.o_proj": (1, 32)},
    "an MLP": {"mlp.down_proj": (1, 48)},
    "a norm": {},
}


@torch.no_grad()
@pytest.mark.parametrize("what", BROADCAST)
def test_what_torch_broadcasts_is_not_compiled(what: str, tmp_path: Path) -> None:
    model = compressed("llama", tmp_path, torch.bfloat16)
    block: Any = model.get_submodule("model.layers.0")
    for name, size in BROADCAST[what].items():
        put(block, name, CompressedLinear.of(grid(size, 16, 32, 0, True)))
    if what == "a norm":
        block.input_layernorm.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    accelerate(model, "exact")
    cache = DynamicCache(config=model.config)
    model(input_ids=PROMPT[:, :4], past_key_values=cache, use_cache=True)
    assert vars(block)["forward"]._compiled_block() is None
    other: Any = model.get_submodule("model.layers.1")
    assert vars(other)["forward"]._compiled_block() is not None


@torch.no_grad()
def test_hidden_states_of_another_width_are_left_to_torch(tmp_path: Path, calls: list[CompiledBlock]) -> None:
    model = compressed("llama", tmp_path, torch.bfloat16)
    block: Any = model.get_submodule("model.layers.0")
    cache = DynamicCache(config=model.config)
    logits(model, cache)
    before, one = len(calls), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    positions = model.get_submodule("model.rotary_emb")(one, torch.tensor([[20]]))
    assert block(one, position_embeddings=positions, past_key_values=cache).shape[-1] == 32
    assert len(calls) == before


@torch.no_grad()
def test_a_cache_that_others_change_is_read_as_it_is(tmp_path: Path, calls: list[CompiledBlock]) -> None:
    model = compressed("llama", tmp_path, torch.bfloat16)

    def step(cache: DynamicCache, *numbers: int) -> Tensor:
        return torch.cat([model(MORE[n], past_key_values=cache, use_cache=True).logits for n in numbers], 1).float()

    def read(model: PreTrainedModel, ahead: int = 0) -> Tensor:
        """The last predictions for each of `texts`, all of it at once; its last token `ahead` of its place."""
        last = []
        for numbers in texts:
            ids = torch.cat([PROMPT, *(MORE[n] for n in numbers)], 1)
            places = torch.arange(ids.shape[1])[None]
            places[0, -1] += ahead
            last.append(model(ids, position_ids=places).logits[:, -1:])
        return torch.cat(last, 1).float()

    cache = DynamicCache(config=model.config)
    model(PROMPT, past_key_values=cache, use_cache=True)
    step(cache, 0, 1)
    copied, shallow = copy.deepcopy(cache), copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    given = [step(cache, 2), step(copied, 3), step(shallow, 4), step(cache, 5)]
    texts: list[tuple[int, ...]] = [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 2, 5)]
    cache.crop(-2)
    given.append(step(cache, 2))
    cache.crop(-2)
    model(MORE[3:5].view(1, 2), past_key_values=cache, use_cache=True)  # as many, at once, by transformers
    given.append(step(cache, 4))
    cache.batch_select_indices(torch.tensor([0]))
    given.append(step(cache, 5))
    texts += [(0, 1, 2), (0, 3, 4, 4), (0, 3, 4, 4, 5)]
    assert len(calls) == 2 * 9
    assert cache.get_seq_length() == 9 + 5
    assert_rounded_alike(torch.cat(given, 1), model, read)


def test_parameters_that_move_are_read_where_they_are(tmp_path: Path, calls: list[CompiledBlock]) -> None:
    model = compressed("qwen2", tmp_path, torch.bfloat16, **WHOLE["qwen2"])
    logits(model)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data = parameter.data * 0.5
    short = logits(model)
    assert len(calls) == 4 * len(MORE)
    restore_blocks(model)
    assert_rounded_alike(short, model)


@pytest.mark.parametrize("family", tiered(["mistral", "gemma3_text"], "mistral".__eq__))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", tiered([5, 12], lambda window: window == 12))
def test_a_window_that_slides_is_kept_to(
    family: str,
    dtype: torch.dtype,
    window: int,
    tmp_path: Path,
    steps: list[OneTokenBlock],
    calls: list[CompiledBlock],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt of 9 tokens and many behind it, so that a cache is moved a few times."""
    monkeypatch.setattr(compiled_block, "LEAST_ROOM", 4)
    model = compressed(family, tmp_path, dtype, sliding_window=window)
    short = logits(model, tokens=MANY)
    before_it_slides = 2 * 2 if (family, window, dtype) == ("mistral", 12, torch.float32) else 0  # without a mask
    assert (len(calls), len(steps)) == (2 * len(MANY) if dtype == torch.bfloat16 else 0, before_it_slides)
    restore_blocks(model)
    if dtype == torch.float32:
        assert_near(short, logits(model, tokens=MANY))
    else:
        assert_rounded_alike(short, model, partial(logits, tokens=MANY))


@pytest.mark.parametrize("how", ["two tokens", "two rows", "a mask", "gradients", "attentions", "a hook", "eager"])
def test_all_else_is_left_to_transformers(how: str, tmp_path: Path, steps: list[OneTokenBlock]) -> None:
    model = compressed("llama", tmp_path)
    tokens, more = MORE, dict[str, Any]()
    match how:
        case "two tokens":
            tokens = MORE.view(3, 1, 2)
        case "two rows":
            tokens = MORE.view(3, 2, 1)
        case "a mask":
            more["attention_mask"] = torch.ones(1, 10, dtype=torch.long).index_fill(1, torch.tensor([0]), 0)
            tokens = MORE[:1]
        case "attentions":
            model.set_attn_implementation("eager")
            more["output_attentions"] = True
        case "a hook":
            seen: list[Tensor] = []
            for layer in (0, 1):
                attention = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
                attention.register_forward_hook(lambda module, given, output: seen.append(output))
        case "eager":
            model.set_attn_implementation("eager")
    if how == "gradients":
        cache = DynamicCache(config=model.config)
        model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
        model(input_ids=MORE[0], past_key_values=cache, use_cache=True)
    else:
        found = logits(model, tokens=tokens, **more)
        restore_blocks(model)
        assert torch.equal(found, logits(model, tokens=tokens, **more))
    assert not steps
    assert how != "a hook" or len(seen) == 2 * 2 * (len(MORE) + 1)


def test_adapters_take_the_places_of_linears(tmp_path: Path, steps: list[OneTokenBlock]) -> None:
    model = compressed("llama", tmp_path)
    logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.eval()
    before = len(steps)
    short = logits(adapted)
    assert len(steps) == before + 2 * len(MORE)
    restore_blocks(adapted)
    assert_near(short, logits(adapted))


@pytest.mark.parametrize(("family", "targets"), [("llama", None), ("qwen3", ["q_norm", "k_norm"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_are_tuned_are_computed_with(
    dtype: torch.dtype, family: str, targets: list[str] | None, tmp_path: Path
) -> None:
    """Those of a block, and those of the heads."""
    model = compressed(family, tmp_path, dtype)
    logits(model)  # which remembers the blocks as they are
    tuned = get_peft_model(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)).eval()
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "ln_tuning_layers" in name:
                value.mul_(1.5)
    found = logits(tuned)
    restore_blocks(tuned)
    assert_near(found, logits(tuned))


def test_a_call_that_asked_for_hidden_states_turns_nothing_off(tmp_path: Path, steps: list[OneTokenBlock]) -> None:
    model = compressed("llama", tmp_path)
    with torch.no_grad():
        assert model(input_ids=PROMPT, output_hidden_states=True).hidden_states is not None
    logits(model)
    assert len(steps) == 2 * len(MORE)
    found = logits(model, output_attentions=True)
    assert len(steps) == 2 * len(MORE), "a call that asks for more goes transformers' way"
    assert_near(found, logits(model))


def test_threads_at_other_tokens_turn_by_their_own() -> None:
    """Angles that another thread puts there in between are not taken for this one's."""
    shared, heads = TokenFacts(), torch.randn(3, 8)
    first, second = (torch.randn(1, 1, 8) for _ in range(2))

    class Interrupted(torch.Tensor):
        def __mul__(self, other: Any) -> Tensor:
            shared.turn(heads, second, second)  # between the question and the answer
            return self.as_subclass(torch.Tensor) * other

    wanted = TokenFacts().turn(heads, first, first)
    found = shared.turn(heads.as_subclass(Interrupted), first, first)
    assert torch.equal(found.as_subclass(torch.Tensor), wanted)


def test_generation_takes_the_short_way(tmp_path: Path, steps: list[OneTokenBlock]) -> None:
    model = compressed("llama", tmp_path)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 257, "eos_token_id": None}
    found = model.generate(PROMPT, **settings)
    assert len(steps) == 2 * 4
    with plain(model):
        assert torch.equal(model.generate(PROMPT, **settings), found)
    assert len(steps) == 2 * 4
    model.generate(PROMPT, **settings)
    assert len(steps) == 2 * 8, "again, behind the context"
    static = StaticCache(config=model.config, max_cache_len=32)
    assert_near(logits(model, static), logits(model))


def test_it_is_copied_and_saved_with_its_model(tmp_path: Path, steps: list[OneTokenBlock]) -> None:
    model = compressed("llama", tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert_near(logits(other), logits(model))
        own = {id(module) for module in other.modules()}
        assert all(id(forward.block) in own for _, forward in restore_blocks(other))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    accelerate(again, "exact")
    assert_near(logits(again), logits(model))


def test_dense_models_and_other_blocks_are_left_alone(tmp_path: Path) -> None:
    model = compressed("gpt2", tmp_path)
    assert not any("forward" in vars(module) for module in model.modules())
    assert one_token.shorten_blocks(nn.Linear(2, 2)) == 0
