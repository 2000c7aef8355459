"""Keys and values in few bits: near transformers' own cache by a known bound, and equal to it in all that it does."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmcompress.errors import InputError, LLMCompressError, NumericsError, RecipeError
from llmcompress.models.transformers.kv_cache import (
    CHANNELS,
    TOKENS,
    CacheForm,
    Grouping,
    QuantizedKVLayer,
    cache,
    held_bytes,
)
from tests.tiny import FAMILY_CONFIGS, tiny

SIZE = 8  # of groups, and channels of a head of the tiny models
IDS = torch.arange(120).reshape(2, 60) * 7 % 256


def states(tokens: int, seed: int = 0, batch: int = 2) -> Tensor:
    """Random states [batch, 3, tokens, 16] with an outlying channel, a constant one and a distant one."""
    torch.manual_seed(seed)
    found = torch.randn(batch, 3, tokens, 16)
    found[..., 3] *= 50
    found[..., 5] = 0.1
    found[..., 7] += 300
    return found


def layer(bits: int = 4, residual: int = 0, window: int | None = None) -> QuantizedKVLayer:
    form = CacheForm(Grouping(bits, SIZE, TOKENS), Grouping(bits, SIZE, CHANNELS), residual)
    return QuantizedKVLayer(form, window)


def held(one: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Return the keys and values that further tokens would be shown."""
    assert one.keys is not None and one.values is not None
    return deepcopy(one).update(one.keys[..., :0, :], one.values[..., :0, :])


@torch.no_grad()
def logits(model: PreTrainedModel, past: Any, chunk: int, ids: Tensor = IDS) -> Tensor:
    return torch.cat([model(part, past_key_values=past).logits for part in ids.split(chunk, 1)], 1)


def by_hand(group: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """Quantize one group in float64, its zero point and step in float16, and return what is left and the step."""
    zero = np.float16(group.min())
    if float(zero) > group.min():
        zero = np.nextafter(zero, np.float16(-np.inf))
    exact = max((group.max() - float(zero)) / (2**bits - 1), 2.0**-24)
    step = np.float16(exact)
    if float(step) < exact:
        step = np.nextafter(step, np.float16(np.inf))
    return np.rint((group - float(zero)) / float(step)) * float(step) + float(zero), float(step)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [TOKENS, CHANNELS])
def test_codes_are_those_of_a_slow_quantizer(bits: int, axis: int) -> None:
    given = states(24)
    grouping = Grouping(bits, SIZE, axis)
    found = grouping.restore(grouping.quantize(given), torch.float64).numpy()
    exact = given.double().numpy()
    along = np.moveaxis(exact, axis, -1)
    expected, steps = np.empty_like(along), np.empty_like(along)
    for place in product(*map(range, along.shape[:-1])):
        for first in range(0, along.shape[-1], SIZE):
            here = (*place, slice(first, first + SIZE))
            expected[here], steps[here] = by_hand(along[here], bits)
    expected, steps = np.moveaxis(expected, -1, axis), np.moveaxis(steps, -1, axis)
    near = np.abs(found - expected) <= 1e-4 * steps + 1e-7 * np.abs(exact)  # float32 restores 300 to 2e-5
    assert near.mean() > 0.999  # ties of rounding may differ between float32 and float64
    assert (np.abs(found - exact) <= 0.5001 * steps + 1e-7 * np.abs(exact)).all()


def test_an_outlying_channel_costs_the_other_keys_nothing() -> None:
    """Keys are grouped by channel, so the error of the others does not follow the outlier."""
    plain, outlying = states(16), states(16)
    outlying[..., 3] *= 100
    grouping = layer().form.keys
    errors = [(grouping.restore(grouping.quantize(one), torch.float32) - one) for one in (plain, outlying)]
    others = [channel for channel in range(16) if channel != 3]
    assert torch.equal(errors[0][..., others], errors[1][..., others])


def test_two_codes_share_a_byte() -> None:
    stored = Grouping(4, SIZE, TOKENS).quantize(states(16))
    assert stored.codes.dtype == torch.uint8 and stored.codes.shape == (2, 3, 16, 8)
    assert stored.scale.dtype == stored.zero.dtype == torch.float16 and stored.scale.shape == (2, 3, 2, 16)
    assert Grouping(4, SIZE, CHANNELS).quantize(states(16)).scale.shape == (2, 3, 16, 2)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_a_longer_residual_changes_no_logit(family: str) -> None:
    model = tiny(family)
    ours, theirs = cache(model, group_size=SIZE, residual=60), DynamicCache(config=model.config)
    assert torch.equal(logits(model, ours, 11), logits(model, theirs, 11))
    assert ours.get_seq_length() == theirs.get_seq_length() == 60
    windows = [one for one in theirs.layers if isinstance(one, DynamicSlidingWindowLayer)]
    assert ours.bytes == held_bytes(theirs) - 8 * len(windows)  # which hold their width as a tensor


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_logits_move_by_less_with_more_bits(family: str) -> None:
    window = {"sliding_window": 32} if "sliding_window" in FAMILY_CONFIGS[family] else {}
    model = tiny(family, **window)
    exact = logits(model, DynamicCache(config=model.config), 4)
    errors = [
        float((logits(model, cache(model, bits, SIZE, residual=4), 4) - exact).norm() / exact.norm()) for bits in (4, 8)
    ]
    assert 0 < errors[1] < errors[0] / 4 and errors[0] < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_what_leaves_the_recent_part_is_off_by_half_a_step(bits: int) -> None:
    """By any chunks: groups are quantized once, at fixed places, so only their number depends on the chunks."""
    keys, values = states(61, 0), states(61, 1)
    for chunk in (1, 7, 61):
        one = layer(bits, residual=10)
        for key, value in zip(keys.split(chunk, 2), values.split(chunk, 2)):
            one.update(key, value)
        found_keys, found_values = held(one)
        assert one.past_keys is not None and one.past_keys.codes.shape[2] == 48
        assert torch.equal(found_keys[..., 48:, :], keys[..., 48:, :])
        assert torch.equal(found_values[..., 48:, :], values[..., 48:, :])
        for grouping, found, exact in ((one.form.keys, found_keys, keys), (one.form.values, found_values, values)):
            old = exact[..., :48, :]
            assert torch.equal(found[..., :48, :], grouping.restore(grouping.quantize(old), torch.float32))
            step = grouping.quantize(old).scale.float().repeat_interleave(SIZE, grouping.axis)
            assert ((found[..., :48, :] - old).abs() <= 0.5001 * step + 1e-6 * old.abs()).all()


def test_the_new_tokens_of_a_pass_are_exact() -> None:
    one = layer()
    keys, values = states(32), states(32, 1)
    found = one.update(keys, values)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert one.past_keys is not None and one.keys.shape[2] == 0


@pytest.mark.parametrize("residual", [0, 3, 64])
@pytest.mark.parametrize("window", [1, 2, 9, 20, 100])
def test_a_sliding_window_shows_the_tokens_that_transformers_does(window: int, residual: int) -> None:
    """Integers up to 15, of which 8 bits are off by less than 0.04, so that any other token would be noticed."""
    torch.manual_seed(0)
    every = torch.randint(0, 16, (2, 3, 64, 16)).float()
    ours, theirs = layer(8, residual, window), DynamicSlidingWindowLayer(sliding_window=window)
    for part in every.split([1, 30, 1, 1, 8, 5, 1, 17], 2):
        assert ours.get_mask_sizes(part.shape[2]) == theirs.get_mask_sizes(part.shape[2])
        found, expected = ours.update(part, part), theirs.update(part, part)
        if window > 1:  # transformers keeps all where none is to be kept
            assert found[0].shape == expected[0].shape
            assert torch.allclose(found[0], expected[0], atol=0.04) and torch.allclose(found[1], expected[1], atol=0.04)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours._length() == min(64, window - 1) and ours.skipped < SIZE


def test_generate_follows_transformers_at_8_bits() -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    given = {"input_ids": IDS[:, :20], "attention_mask": torch.ones_like(IDS[:, :20])}
    given["attention_mask"][0, :5] = 0  # padded on the left
    past = cache(model, 8, SIZE, residual=8)
    assert torch.equal(model.generate(**given, past_key_values=past, **options), model.generate(**given, **options))
    assert past.get_seq_length() == 39 and past.bytes < held_bytes(_filled(model, given, options))


def _filled(model: PreTrainedModel, given: dict[str, Tensor], options: dict[str, Any]) -> DynamicCache:
    past = DynamicCache(config=model.config)
    model.generate(**given, past_key_values=past, **options)
    return past


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_and_samples_are_generated(family: str) -> None:
    model = tiny(family)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 257, "do_sample": False}
    beams = model.generate(IDS, past_key_values=cache(model, 8, SIZE, 100), num_beams=3, **options)
    assert torch.equal(beams, model.generate(IDS, num_beams=3, **options))
    assert model.generate(IDS, past_key_values=cache(model, 4, SIZE, 4), num_beams=3, **options).shape == (2, 68)
    torch.manual_seed(0)
    options |= {"do_sample": True, "num_return_sequences": 2}
    assert model.generate(IDS, past_key_values=cache(model, 4, SIZE, 4), **options).shape == (4, 68)


@pytest.mark.parametrize("tokens", [5, 40])
def test_batches_are_reordered_repeated_and_selected(tokens: int) -> None:
    """Quantizing works on each text alone, so it commutes with all three, bit for bit."""
    order = torch.tensor([2, 0, 0])
    keys, values = states(tokens, 0, 3), states(tokens, 1, 3)
    for change, made in (
        (lambda one: one.reorder_cache(order), lambda tensor: tensor[order]),
        (lambda one: one.batch_select_indices(order[:2]), lambda tensor: tensor[order[:2]]),
        (lambda one: one.batch_repeat_interleave(2), lambda tensor: tensor.repeat_interleave(2, 0)),
    ):
        one, other = layer(residual=4), layer(residual=4)
        change(one)  # nothing is there yet
        one.update(keys, values)
        change(one)
        other.update(made(keys), made(values))
        for found, expected in zip(held(one), held(other)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("removed", [0, 1, 3, 9, 16, 39, 40, 50])
def test_crop_keeps_what_was_before(removed: int) -> None:
    one = layer(residual=4)
    one.update(states(40), states(40, 1))
    before = held(one)
    one.crop(-removed)
    left = max(40 - removed, 0)
    assert one.get_seq_length() == left == one._length()
    for found, expected in zip(held(one), before):
        assert torch.equal(found, expected[..., :left, :])
    one.update(states(20, 2), states(20, 3))
    assert one.get_seq_length() == left + 20 and (one._coded_length() % SIZE, one.keys.shape[2] < 4 + SIZE) == (0, True)


@pytest.mark.parametrize("removed", [0, 1, 6, 13])
def test_crop_of_a_window_puts_back_what_was_recorded(removed: int) -> None:
    """It is near what was given, and near what a layer holds that never saw the removed tokens."""
    ours, other = layer(8, 2, window=20), layer(8, 2, window=20)
    before, later = states(48), states(13, 2)
    for one in (ours, other):
        one.update(before, before)
    ours.activate_past_recording()
    for part in (later[:, :, :6], later[:, :, 6:]):
        assert ours.update(part, part)[0].shape[2] == 19 + part.shape[2]
    ours.crop(-removed)
    other.update(later[:, :, : 13 - removed], later[:, :, : 13 - removed])
    assert ours.get_seq_length() == 61 - removed and ours._length() == 19
    exact = torch.cat([before, later], 2)[:, :, 61 - removed - 19 : 61 - removed]
    assert torch.allclose(held(ours)[0], exact, rtol=0, atol=1.0)
    assert torch.allclose(held(ours)[0], held(other)[0], rtol=0, atol=1.0)


def test_assisted_generation_rolls_back() -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    past = cache(model, 8, SIZE, residual=8)
    found = model.generate(IDS[:1, :30], past_key_values=past, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(found, model.generate(IDS[:1, :30], **options))


def test_reset_begins_again() -> None:
    model = tiny("mistral")
    past = cache(model, 4, SIZE, residual=4)
    first = logits(model, past, 7)
    past.reset()
    assert past.get_seq_length() == 0 and past.bytes == 0
    assert torch.equal(logits(model, past, 7), first)
    past.reset()
    assert torch.equal(logits(model, past, 7, IDS[:1]), logits(model, cache(model, 4, SIZE, 4), 7, IDS[:1]))


def test_bytes_are_those_of_the_format() -> None:
    """Two blocks, two texts, two heads of eight channels, 56 of 60 tokens in codes, keys and values."""
    model = tiny("llama")
    past = cache(model, 4, SIZE, residual=4)
    logits(model, past, 60)
    numbers = 2 * 2 * 2 * 2 * SIZE
    assert past.bytes == numbers * (56 // 2 + 56 // SIZE * 2 * 2 + 4 * 4)


def test_stored_states_hold_no_graph() -> None:
    model = tiny("llama")
    past = cache(model, 4, SIZE, residual=4)
    loss = model(IDS, past_key_values=past).logits.sum()
    loss.backward()
    assert all(not one.keys.requires_grad for one in past.layers) and model.lm_head.weight.grad is not None


def test_hybrids_keep_their_linear_layers() -> None:
    model = tiny("lfm2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, layer_types=["conv", "full_attention"], max_position_embeddings=64)  # fmt: skip
    ours, theirs = cache(model, 4, SIZE, residual=60), DynamicCache(config=model.config)
    assert torch.equal(logits(model, ours, 60), logits(model, theirs, 60))
    assert [type(one).__name__ for one in ours.layers] == ["LinearAttentionLayer", "QuantizedKVLayer"]
    assert ours.bytes == held_bytes(theirs)


@pytest.mark.parametrize(
    ("changes", "words", "kind"),
    [
        ({"bits": 3}, "in bits 3", RecipeError),
        ({"bits": "4"}, "in bits '4'", RecipeError),
        ({"group_size": 0}, "group_size 0", RecipeError),
        ({"group_size": 7}, "group_size 7", RecipeError),
        ({"group_size": 32}, "does not divide the 8 channels of a head; give 8, 4, 2", RecipeError),
        ({"residual": -1}, "residual -1", RecipeError),
        ({"residual": 1.5}, "residual 1.5", RecipeError),
    ],
)
def test_settings_that_cannot_be_had(changes: dict[str, Any], words: str, kind: type[LLMCompressError]) -> None:
    with pytest.raises(kind, match=words) as error:
        cache(tiny("llama"), **({"group_size": SIZE} | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv", "t5", "falcon_h1"])
def test_models_without_such_a_cache(family: str) -> None:
    model = torch.nn.Module()
    model.config = AutoConfig.for_model(family)  # type: ignore[assignment]
    with pytest.raises(InputError, match=family if family != "falcon_h1" else "LinearAttentionAndFullAttentionLayer"):
        cache(model)  # type: ignore[arg-type]


def test_no_model_at_all() -> None:
    with pytest.raises(InputError, match="a str is no model"):
        cache("smollm2")  # type: ignore[arg-type]


def test_states_that_cannot_be_stored() -> None:
    for wrong in (torch.nan, torch.inf, 1e6):
        given = states(16)
        given[0, 0, 0, 0] = wrong
        with pytest.raises(NumericsError, match="beyond float16's range"):
            layer().update(given, given)
    with pytest.raises(RecipeError, match="does not divide the 12 channels"):
        layer().update(states(16)[..., :12], states(16)[..., :12])


def test_crops_that_cannot_be_had() -> None:
    one = layer(window=8)
    one.update(states(16), states(16))
    with pytest.raises(RecipeError, match="give -3"):
        one.crop(3)
    with pytest.raises(RecipeError, match="activate_past_recording"):
        one.crop(-1)
