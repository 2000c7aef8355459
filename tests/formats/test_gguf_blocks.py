"""Bytes of GGUF's quantized blocks by gguf's own reader, and what the method `gguf` makes of a matrix in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.export import export
from llmcompress.formats.gguf.blocks import IQ4, Blocks
from llmcompress.formats.gguf.head import file_type
from llmcompress.formats.gguf.tensor_types import (
    FLOATS,
    MXFP4,
    QUANTIZED,
    ROUNDABLE,
    TensorType,
    common_divisor,
    exact_type,
    pack_tensor,
    round_to_type,
)
from llmcompress.methods.grids import gguf as method
from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers.floats import LAYOUTS, nearest_floats
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, Sum, Weight
from llmcompress.weight.superblocks import LAYOUTS as SUPERBLOCKS
from tests.builders import compressed, correlated, gaussian, grid, moments, seeded
from tests.formats.gguf_files import byte_level, engine, gguf, largest_difference, run
from tests.formats.gguf_files import compressed as checkpoint
from tests.tiers import tiered, tiered_nightly
from tests.tiny import tiny

READ = [kind for kind in QUANTIZED if kind.name != "Q1_0"]  # of which gguf has no reader
TYPES = sorted(method.FORMS.keys() | SUPERBLOCKS.keys())
# A table, a simple type, offsets, superblocks with offsets, a table of vectors, two bits
FAST = ("IQ4_XS", "Q4_0", "Q4_1", "Q4_K", "IQ2_XS", "TQ2_0")
SLOW = ("Q8_0", "Q6_K", "Q3_K", "IQ3_S", "IQ1_M")
every_type = pytest.mark.parametrize("kind", tiered(TYPES, FAST.__contains__, slow=SLOW.__contains__))


def read(kind: str, written: Tensor) -> Tensor:
    """The values of packed rows by gguf's own reader."""
    return torch.from_numpy(gguf.quants.dequantize(written.numpy(), gguf.GGMLQuantizationType[kind]))


def drawn(low: int, high: int, *size: int) -> Tensor:
    """Random integers, both ends among them."""
    numbers = torch.randint(low, high + 1, size, generator=seeded(low + high), dtype=torch.int16)
    numbers.view(-1)[:2] = torch.tensor([low, high])
    return numbers


def random_blocks(kind: TensorType) -> tuple[Blocks, Tensor]:
    """Blocks of a type `[3, 2, columns]`, and the values that the type's definition gives them."""
    table = torch.tensor(list(kind.integers), dtype=torch.int16)
    k = table[drawn(0, len(table) - 1, 3, 2, kind.block).long()]
    d, e = torch.rand(2, 3, 2, 1, generator=seeded(1)).half()
    values, parts = k * d.float(), {}
    group = kind.group or kind.block
    if kind.multiples:
        parts["n"] = drawn(kind.multiples[0], kind.multiples[-1], 3, 2, kind.block // group)
        values = k * (d.float() * parts["n"]).repeat_interleave(group, 2)
    if kind.offsets is None:
        parts["offset"] = e - 0.5
        values = values + parts["offset"].float()
    elif kind.offsets:
        parts |= {"e": e, "j": drawn(0, kind.offsets[-1], 3, 2, kind.block // group)}
        values = values - (e.float() * parts["j"]).repeat_interleave(group, 2)
    return Blocks(k, d, **parts), values


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.name)
def test_blocks_follow_the_definition_of_their_type(kind: TensorType) -> None:
    found, values = random_blocks(kind)
    assert kind.pack is not None
    written = kind.pack(found)
    assert (kind.block, written.shape[2]) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert written.shape[2] == kind.block_bytes
    assert torch.equal(read(kind.name, written.flatten(1)), values.flatten(1))


def test_quantized_types_are_sorted_by_size() -> None:
    sizes = [kind.block_bytes / kind.block for kind in QUANTIZED]
    assert sizes == sorted(sizes)


def test_microscaling_floats_are_held_value_for_value() -> None:
    w = nearest_floats(gaussian(5, 96), LAYOUTS["mxfp4"])
    assert exact_type(w).name == "MXFP4"
    assert torch.equal(read("MXFP4", pack_tensor(w, exact_type(w))), dense(w))
    for kind, width, reason in (("mxfp8", 96, "is no single grid"), ("mxfp4", 40, "does not fill blocks of 32")):
        w = nearest_floats(gaussian(5, width), LAYOUTS[kind])
        with pytest.raises(UnfitError, match=reason):
            exact_type(w)


@pytest.mark.parametrize("step", [1, 3, 96, 1024, 61 * 1024])
def test_the_common_divisor_gives_the_scales_back(step: int) -> None:
    """Numbers of float16 that are multiples of one: at most 63 times the largest divisor, and the product exact."""
    n = drawn(0, 31, 2, 1, 8)
    n[..., 2] = 31
    scale = (n.double() * step * 2.0**-24).float()
    assert torch.equal(scale.half().float(), scale), "the case is one of float16 numbers"
    d, found = common_divisor(scale)
    assert torch.equal(d.float() * found, scale) and int(found.max()) <= 31


def test_scales_without_a_common_divisor_need_a_simple_type() -> None:
    w = grid((3, 256), 8, 32, 0, symmetric=False)
    assert exact_type(w).name == "Q4_0", "as three bits in groups of 16 with small multiples would be Q3_K"
    with pytest.raises(UnfitError, match="does not fill blocks of 32 columns"):
        exact_type(grid((3, 256), 8, 16, 0, symmetric=False))


def test_other_low_rank_terms_are_no_offsets() -> None:
    """A term of any other right factor is not in the types, wherever it stands."""
    base = grid((5, 64), 16, 32, 0, symmetric=False)
    term = LowRank(Dense(torch.randn(5, 2)), Dense(torch.randn(2, 64)))
    wrong = Grid(torch.ones(2, 64, dtype=torch.uint8), torch.ones(1, 1).half(), torch.zeros(1, 1).byte(), 2, 64)
    for w in (Sum((term, base)), Sum((LowRank(term.left, wrong), base))):
        with pytest.raises(UnfitError, match="is no single grid"):
            exact_type(w)


# --- the method -----------------------------------------------------------------------------------------------------


def made(kind: str, width: int = 512, weight: Tensor | None = None) -> Weight:
    """Result of the method on a matrix."""
    weight = gaussian(24, width) if weight is None else weight
    return compressed(weight, correlated(1024, width, seed=1), {"method": "gguf", "type": kind}).expression()


@every_type
def test_the_method_fills_the_type_that_it_names(kind: str) -> None:
    w = made(kind)
    assert exact_type(w).name == kind
    assert torch.equal(read(kind, pack_tensor(w, exact_type(w))), dense(w))


@every_type
def test_numbers_of_any_size_fit(kind: str) -> None:
    """A row of zeros, one of very small numbers, one with an outlier, one of one sign."""
    weight = gaussian(6, 256)
    weight[0], weight[1], weight[2, 3], weight[3] = 0, weight[1] * 1e-5, 50.0, weight[3].abs() + 0.1
    w = made(kind, 256, weight)
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert exact_type(w).row_bytes(256) <= 256 // block * block_bytes
    assert torch.equal(read(exact_type(w).name, pack_tensor(w, exact_type(w))), dense(w))
    assert int(dense(w)[0].count_nonzero()) == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_without_data_no_row_is_worse_than_plain_rounding(kind: str) -> None:
    """Against gguf's own quantizer, which has no search."""
    weight, number = gaussian(24, 256), gguf.GGMLQuantizationType[kind]
    ours = dense(compressed(weight, torch.zeros(0, 256), {"method": "gguf", "type": kind}).expression())
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number))
    lost = [(values - weight).square().sum(1) for values in (ours, theirs)]
    assert bool((lost[0] <= lost[1] * 1.02).all()) and float(lost[0].sum()) < 0.97 * float(lost[1].sum())


@every_type
def test_feedback_pays_on_tokens_it_has_not_seen(kind: str) -> None:
    weight, unseen = gaussian(24, 256), moments(correlated(1024, 256, seed=2))
    plain = compressed(weight, torch.zeros(0, 256), {"method": "gguf", "type": kind}).expression()
    fed = compressed(weight, correlated(4096, 256, seed=1), {"method": "gguf", "type": kind}).expression()
    assert relative_error(weight, fed, unseen) < 0.8 * relative_error(weight, plain, unseen)


@pytest.mark.parametrize("kind, instead", [("Q4_K", "Q5_0"), ("IQ2_XS", "IQ4_NL"), ("TQ2_0", "Q4_0")])
def test_a_width_without_superblocks_gets_the_type_that_llama_cpp_takes(kind: str, instead: str) -> None:
    done = compressed(gaussian(8, 96), correlated(256, 96), {"method": "gguf", "type": kind})
    assert exact_type(done.expression()).name == instead


def test_both_tables_of_iq4_types_are_the_same() -> None:
    assert method.IQ4 == IQ4
    assert list(gguf.quants.IQ4_NL.kvalues) == list(IQ4)


@engine
@every_type
def test_llama_cpp_multiplies_by_what_the_method_fills(kind: str, tmp_path: Any) -> None:
    """llama.cpp rounds what quantized matrices multiply to 8 bits; with wrong bits, log-probabilities move by 5."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.05, "vocab_size": 640}
    tiny("llama", **sizes).save_pretrained(tmp_path / "dense")
    byte_level(("words",)).save_pretrained(tmp_path / "dense")
    small = checkpoint(tmp_path / "dense", tmp_path / "small", ("*", [{"method": "gguf", "type": kind}]))
    done = export(small, tmp_path / "out", "gguf")
    assert done.kept[0].endswith(f"(14 as {kind})") and not done.changed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    ids = [(number * 37) % 640 for number in range(1, 33)]
    assert largest_difference(run(tmp_path / "out"), model, ids, 640) < 0.25


@pytest.mark.parametrize("kind", [*(kind.name for kind in (*QUANTIZED, *FLOATS.values(), MXFP4)), *SUPERBLOCKS])
def test_every_type_can_be_that_of_most_weights(kind: str) -> None:
    """llama.cpp prints a file's type; the K types are there with the letter S, MXFP4 with MOE."""
    assert file_type(kind).name.split("_", 1)[1].removesuffix("_MOE") in (kind, f"{kind}_S")


# --- rounding what no type holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_rounding_is_that_of_gguf(name: str) -> None:
    """Q8_0 of gguf ends at 127 on both sides, ours at -128: its steps are that much smaller."""
    values, number = gaussian(9, 128), gguf.GGMLQuantizationType[name]
    values[0, :32] = 0
    w = round_to_type(values, ROUNDABLE[name])
    assert torch.equal(read(name, pack_tensor(w, ROUNDABLE[name])), dense(w))
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), number), number))
    lost = [float((rounded - values).norm()) for rounded in (dense(w), theirs)]
    assert lost[0] == pytest.approx(lost[1], rel=0.03)


def test_round_to_rounds_matrices_that_no_type_holds(tmp_path: Any) -> None:
    tiny("llama", hidden_size=64, intermediate_size=96, vocab_size=640).save_pretrained(tmp_path / "dense")
    byte_level(("words",)).save_pretrained(tmp_path / "dense")
    steps = [{"method": "rotate"}, {"method": "rtn", "bits": 4, "group_size": 32}]
    table = [{"method": "gguf", "type": "Q8_0"}]
    small = checkpoint(tmp_path / "dense", tmp_path / "small", ("*", steps), embeddings=table)
    done = export(small, tmp_path / "out", "gguf", round_to="Q8_0")
    assert done.kept[0] == "2 matrices, value for value (2 as Q8_0)", "the token table and the output head"
    assert done.changed[0].startswith("14 matrices became Q8_0, model.layers.0.mlp.down_proj first, rounded by at")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    tensor, layer = tensors["blk.1.ffn_down.weight"], "model.layers.1.mlp.down_proj"
    values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    expected = dense(CompressedCheckpoint(small).expression(layer))
    assert float((values - expected).norm() / expected.norm()) < 0.006
    with pytest.raises(RecipeError, match="nothing is rounded to 'Q9_0' here; choose one of Q4_0, Q5_0, Q8_0"):
        export(small, tmp_path / "other", "gguf", round_to="Q9_0")
    with pytest.raises(RecipeError, match="only the export to gguf rounds to a type, not that to dense; leave"):
        export(small, tmp_path / "other", "dense", round_to="Q8_0")


def test_widths_that_blocks_do_not_fill_are_refused_or_dense(tmp_path: Any) -> None:
    tiny("llama", hidden_size=64, intermediate_size=72, vocab_size=640).save_pretrained(tmp_path / "dense")
    byte_level(("words",)).save_pretrained(tmp_path / "dense")
    small = checkpoint(tmp_path / "dense", tmp_path / "small", ("*.down_proj", [{"method": "rtn", "bits": 4}]))
    with pytest.raises(InputError, match=r"a width of 72 is not filled by blocks of 32 columns\); allow dense layers"):
        export(small, tmp_path / "out", "gguf", round_to="Q8_0")
    done = export(small, tmp_path / "out", "gguf", allow_dense=True, round_to="Q8_0")
    assert done.changed[0].startswith("2 matrices became bfloat16")


@engine
@pytest.mark.parametrize("kind", tiered_nightly(TYPES, FAST.__contains__))
def test_no_type_is_filled_worse_than_by_llama_cpps_own_quantizer(kind: str) -> None:
    """On tokens that neither has seen; also where it is given an importance matrix of the same calibration."""
    from llama_quantizer import quantize

    weight, seen = gaussian(24, 512), correlated(4096, 512, seed=1)
    unseen = moments(correlated(4096, 512, seed=2))
    ours = compressed(weight, seen, {"method": "gguf", "type": kind}).expression()
    for importance in (None, seen.square().mean(0)):
        _, size, theirs = quantize(weight, kind, importance)
        assert size == 24 * exact_type(ours).row_bytes(512), "at equal bytes"
        assert relative_error(weight, ours, unseen) < 0.6 * relative_error(weight, theirs, unseen)
