"""Keys and values of attention in 8 or 4 bits while a model generates, as a cache of transformers.

Keys are quantized per channel and values per token, as KIVI (arXiv 2402.02750) found best: a few channels of the keys
are large in every token, and would set the step of all others. Each group of numbers has a scale and a zero point in
float16, and codes of 4 bits lie two to a byte. The most recent tokens stay as the model computed them.

Unlike in the quantized caches of transformers, a token is quantized only once, when it leaves that recent part. Every
step decodes the keys and values of one layer after the other, so the cache saves memory and takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmcompress.errors import InputError, NumericsError, RecipeError, list_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (4, 8)
TOKENS, CHANNELS = -2, -1  # axes of keys and values [batch, heads, tokens, head_dim]
SMALLEST = 2.0**-24  # step that float16 has, for groups of equal numbers
WITHOUT_TOKENS = {"DummyLayer", "LinearAttentionLayer"}  # hold nothing that grows with the text


def cache(model: PreTrainedModel, bits: int = 4, group_size: int = 32, residual: int = 128) -> QuantizedKVCache:
    """Return an empty cache that keeps the keys and values of a model's attention in few bits.

    Give it to `model.generate(**inputs, past_key_values=lc.cache(model, bits=4))`, or to a loop of forward passes in
    place of a `DynamicCache`. It holds one batch of texts; call `reset` for the next. A number takes
    `bits + 32 / group_size` bits. The tokens of one forward pass see each other, and the recent ones, as the model
    computed them; stored numbers carry no gradient.

    Args:
        model: A causal language model of transformers, compressed or not; only its config is read.
        bits: 4 or 8, for each number.
        group_size: Numbers that share a scale and a zero point: channels of a token's values, tokens of a channel of
            the keys. Even, and a divisor of the model's `head_dim`.
        residual: At least this number of latest tokens, and fewer than `residual + group_size`, stay in the model's
            dtype.

    Returns:
        A `Cache` of transformers; its property `bytes` is the memory that it holds.

    Raises:
        RecipeError: `bits`, `group_size` or `residual` cannot be had for this model.
        InputError: The model has no attention that keeps keys and values, or keeps them in an unknown way.
    """
    if bits not in WIDTHS:
        raise RecipeError(f"keys and values cannot be kept in bits {bits!r}; give 4 or 8")
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise RecipeError(f"group_size {group_size} of a cache is not a positive even number; give 16, 32 or 64")
    if not isinstance(residual, int) or residual < 0:
        raise RecipeError(f"residual {residual} of a cache is not a number of tokens; give 0 or more")
    config = _decoder_config(model)
    if getattr(config, "kv_lora_rank", None) is None:  # else a head of the cache is no head of the model
        heads = config.num_attention_heads
        _check_group_size(group_size, getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = DynamicCache(config=config).layers
    form = CacheForm(Grouping(bits, group_size, TOKENS), Grouping(bits, group_size, CHANNELS), residual)
    return QuantizedKVCache(layers=[_quantized_layer(layer, form) for layer in layers])


def held_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that a cache of any kind holds."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in _tensors(vars(layer)))


@dataclass(frozen=True)
class Codes:
    """Quantized tokens: codes uint8 [batch, heads, tokens, head_dim or half of it], scale and zero float16 per group.

    These are [batch, heads, tokens / group, head_dim] of keys, [batch, heads, tokens, head_dim / group] of values.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """Return codes whose three tensors are changed alike."""
        return Codes(change(self.codes), change(self.scale), change(self.zero))

    def followed_by(self, later: Codes) -> Codes:
        """Return the tokens of both, in order."""
        pairs = ((self.codes, later.codes), (self.scale, later.scale), (self.zero, later.zero))
        return Codes(*(torch.cat(pair, TOKENS) for pair in pairs))


@dataclass(frozen=True)
class Grouping:
    """Asymmetric grids of `2**bits` points for groups of `size` neighbours along `axis`."""

    bits: int
    size: int
    axis: int

    def quantize(self, states: Tensor) -> Codes:
        """Return the codes of states [batch, heads, tokens, head_dim], at most half a step away from each.

        Raises NumericsError for states that are NaN, or beyond float16.
        """
        grouped = states.float().unflatten(self.axis, (-1, self.size))
        low, high = grouped.amin(self.axis), grouped.amax(self.axis)
        # Both are rounded outwards, so that the grid spans the group and half a step bounds the error.
        zero = _float16(low, -torch.inf)
        scale = _float16(((high - zero.float()) / (2**self.bits - 1)).clamp(min=SMALLEST), torch.inf)
        if not bool((zero.isfinite() & scale.isfinite()).all()):
            raise NumericsError(
                "keys or values of attention are NaN or beyond float16's range, which a quantized cache cannot hold; "
                "generate with transformers' own cache"
            )
        places = (grouped - zero.float().unsqueeze(self.axis)) / scale.float().unsqueeze(self.axis)
        codes = places.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(self.axis - 1, self.axis)
        return Codes(self._pack(codes), scale, zero)

    def restore(self, stored: Codes, dtype: torch.dtype) -> Tensor:
        """Return the states [batch, heads, tokens, head_dim] that codes stand for."""
        grouped = self._unpack(stored.codes).float().unflatten(self.axis, (-1, self.size))
        scale, zero = stored.scale.float().unsqueeze(self.axis), stored.zero.float().unsqueeze(self.axis)
        return grouped.mul_(scale).add_(zero).flatten(self.axis - 1, self.axis).to(dtype)

    def part(self, stored: Codes, first: int, last: int) -> Codes:
        """Return a copy of the tokens [first, last); both are multiples of `size`."""
        tokens = self.size if self.axis == TOKENS else 1  # of one row of scales
        rows = slice(first // tokens, last // tokens)
        codes, scale, zero = stored.codes[..., first:last, :], stored.scale[..., rows, :], stored.zero[..., rows, :]
        return Codes(codes.clone(), scale.clone(), zero.clone())

    def _pack(self, codes: Tensor) -> Tensor:
        """Put the codes of a head's first half of channels into the low bits of bytes, the others into high ones."""
        if self.bits == 8:
            return codes
        low, high = codes.chunk(2, CHANNELS)
        return low | (high << 4)

    def _unpack(self, packed: Tensor) -> Tensor:
        return packed if self.bits == 8 else torch.cat([packed & 15, packed >> 4], CHANNELS)


@dataclass(frozen=True)
class CacheForm:
    """The groupings of keys and of values, and the number of latest tokens that are not quantized."""

    keys: Grouping
    values: Grouping
    residual: int

    @property
    def group_size(self) -> int:
        """Tokens that are quantized together."""
        return self.keys.size


class QuantizedKVLayer(DynamicLayer):
    """The cache of one attention layer: `past_keys` and `past_values` in codes, then recent `keys` and `values`.

    Tokens before a sliding window go by whole groups; the first `skipped` tokens in codes are out of it.
    """

    keys: Tensor  # recent ones, [batch, heads, tokens, head_dim]; meaningless before `is_initialized`
    values: Tensor

    def __init__(self, form: CacheForm, sliding_window: int | None = None) -> None:
        super().__init__()
        self.form = form
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.past_keys: Codes | None = None
        self.past_values: Codes | None = None
        self.skipped = 0
        self.cumulative_length = 0  # of all tokens seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the batch size, heads, dtype and device of the first states. Raises RecipeError, see `cache`."""
        _check_group_size(self.form.group_size, value_states.shape[CHANNELS])
        if key_states.shape[CHANNELS] % 2:
            raise RecipeError(f"keys of {key_states.shape[CHANNELS]} channels cannot be packed in pairs; give bits 8")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :].detach(), value_states[..., :0, :].detach()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states, and return all that the new tokens may attend to: decoded, recent and new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past_keys, past_values = self._past()
        keys = torch.cat([*past_keys, self.keys, key_states], TOKENS)
        values = torch.cat([*past_values, self.values, value_states], TOKENS)
        if self.sliding_window is not None:  # recorded states may be more than the mask is for
            visible = self.sliding_window - 1 + key_states.shape[TOKENS]
            keys, values = keys[..., -visible:, :], values[..., -visible:, :]
        self.keys = torch.cat([self.keys, key_states.detach()], TOKENS)
        self.values = torch.cat([self.values, value_states.detach()], TOKENS)
        self.cumulative_length += key_states.shape[TOKENS]
        if not self.record_past:
            self._leave_window()
        self._quantize_older()
        return keys, values

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, within the window or before it."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Return the window's tokens, or -1 for no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that `update` will return for `query_length` new tokens, and the first position."""
        before = self.cumulative_length
        if self.sliding_window is not None:
            before = min(before, self.sliding_window - 1)
        return before + query_length, self.cumulative_length - before

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop`, which may put them back."""
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens, and with them the batch size."""
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose texts of the batch anew, some repeatedly, for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some texts of the batch."""
        self._map(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; the codes of the others stay.

        Raises RecipeError for a positive number, and for tokens that a sliding window has moved past.
        """
        if tokens_to_remove > 0:
            raise RecipeError(
                f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}; "
                f"give {-tokens_to_remove}"
            )
        if not self.is_initialized or (tokens_to_remove == 0 and not self.is_sliding):
            return
        if self.sliding_window is not None and self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RecipeError(
                f"tokens before a sliding window of {self.sliding_window} are gone and crop cannot put them back; "
                "call activate_past_recording() on the cache before the tokens that may be removed"
            )
        self._remove(min(-tokens_to_remove, self._length()))
        self._leave_window()

    def _remove(self, count: int) -> None:
        """Remove the last tokens; the rest of a group in codes that is cut becomes recent."""
        recent, quantized = self.keys.shape[TOKENS], self._coded_length()
        self.cumulative_length -= count
        left = quantized - max(count - recent, 0)  # in codes
        if left == quantized:
            self.keys = self.keys[..., : recent - count, :].clone()
            self.values = self.values[..., : recent - count, :].clone()
            return
        whole = left // self.form.group_size * self.form.group_size
        tokens = slice(max(whole - self.skipped, 0), left - self.skipped)
        [keys], [values] = self._past()
        self.keys, self.values = keys[..., tokens, :].clone(), values[..., tokens, :].clone()
        self._keep_codes(0, whole)

    def _leave_window(self) -> None:
        """Drop the tokens that are before the window of the next one."""
        if self.sliding_window is None or (excess := self._length() - self.sliding_window + 1) <= 0:
            return
        in_codes = min(excess, self._coded_length() - self.skipped)
        self.skipped += in_codes
        whole = self.skipped // self.form.group_size * self.form.group_size
        if whole:
            self.skipped -= whole
            self._keep_codes(whole, self._coded_length())
        if excess > in_codes:
            self.keys = self.keys[..., excess - in_codes :, :].clone()
            self.values = self.values[..., excess - in_codes :, :].clone()

    def _quantize_older(self) -> None:
        """Quantize whole groups of the recent tokens beyond the residual ones."""
        size = self.form.group_size
        count = (self.keys.shape[TOKENS] - self.form.residual) // size * size
        if count <= 0:
            return
        keys = self.form.keys.quantize(self.keys[..., :count, :])
        values = self.form.values.quantize(self.values[..., :count, :])
        self.past_keys = keys if self.past_keys is None else self.past_keys.followed_by(keys)
        self.past_values = values if self.past_values is None else self.past_values.followed_by(values)
        self.keys = self.keys[..., count:, :].clone()  # a view would hold all of it in memory
        self.values = self.values[..., count:, :].clone()

    def _past(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the decoded keys and values, each a list of one tensor, or of none without codes."""
        if self.past_keys is None or self.past_values is None:
            return [], []
        keys = self.form.keys.restore(self.past_keys, self.keys.dtype)
        values = self.form.values.restore(self.past_values, self.values.dtype)
        return [keys[..., self.skipped :, :]], [values[..., self.skipped :, :]]

    def _keep_codes(self, first: int, last: int) -> None:
        """Keep the tokens [first, last) in codes; both are at the ends of groups."""
        if self.past_keys is None or self.past_values is None or first == last:
            self.past_keys = self.past_values = None
            self.skipped = 0
            return
        self.past_keys = self.form.keys.part(self.past_keys, first, last)
        self.past_values = self.form.values.part(self.past_values, first, last)

    def _coded_length(self) -> int:
        return 0 if self.past_keys is None else self.past_keys.codes.shape[TOKENS]

    def _length(self) -> int:
        return self._coded_length() - self.skipped + self.keys.shape[TOKENS]

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.past_keys = self.past_keys and self.past_keys.map(change)
            self.past_values = self.past_values and self.past_values.map(change)


class QuantizedKVCache(Cache):
    """A cache of transformers whose attention layers are `QuantizedKVLayer`s; `lc.cache` makes it."""

    @property
    def bytes(self) -> int:
        """The memory that the cache holds now: codes, scales, zero points and recent tokens of all layers."""
        return held_bytes(self)


def _decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"a {type(model).__name__} is no model of transformers; give what from_pretrained returned")
    if config.is_encoder_decoder:
        raise InputError(f"{config.model_type} is an encoder and a decoder; a cache is made for causal models alone")
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "num_attention_heads", None) is None:
        raise InputError(f"{config.model_type} has no attention whose keys and values could be kept; it needs no cache")
    return decoder


def _quantized_layer(layer: Any, form: CacheForm) -> Any:
    """Return the quantized layer in place of one of transformers' own, or that one if it holds no tokens."""
    kind = type(layer)
    if kind is DynamicLayer:
        return QuantizedKVLayer(form)
    if kind is DynamicSlidingWindowLayer:
        return QuantizedKVLayer(form, layer.sliding_window)
    if kind.__name__ in WITHOUT_TOKENS:
        return layer
    raise InputError(f"this model keeps a {kind.__name__}, which cannot be quantized; use transformers' own cache")


def _check_group_size(group_size: int, width: int) -> None:
    if width % group_size:
        divisors = [str(size) for size in range(width, 1, -1) if width % size == 0 and size % 2 == 0]
        raise RecipeError(
            f"group_size {group_size} does not divide the {width} channels of a head; give {list_names(divisors)}"
        )


def _float16(numbers: Tensor, towards: float) -> Tensor:
    """Round float32 numbers to float16 in the direction of an infinity."""
    near = numbers.to(torch.float16)
    wrong = near.float() < numbers if towards > 0 else near.float() > numbers
    return torch.where(wrong, torch.nextafter(near, torch.full_like(near, towards)), near)


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case Codes():
            yield from (value.codes, value.scale, value.zero)
        case dict():
            for each in value.values():
                yield from _tensors(each)
