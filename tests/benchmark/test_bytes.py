"""Bytes: those that a token reads against a count by hand, caches, buffers, and memory against the system's own."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llmcompress as lc
from llmcompress.benchmark.candidate import Candidate, draw_prompt, find_candidates
from llmcompress.benchmark.protocol import LEAST, BandwidthMeter, SpeedProtocol, buffer_bytes, last_level_cache
from llmcompress.benchmark.worker import ROOT, resident_memory, restart_peak
from llmcompress.errors import InputError
from llmcompress.models.files.gguf_header import read_gguf_header
from llmcompress.runtime.memory import peak_memory
from tests.tiny import VOCABULARY, save_tiny
from tests.zoo import COUNT, save_zoo

SHORT = SpeedProtocol(threads=(1,), prompt=8, tokens=2)
BLOCK = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32  # of the tiny Llama: attention, MLP, two norms
REST = 2 * BLOCK + 32


def find_candidate(folder: Path, **changes: object) -> Candidate:
    """The only model of a measurement."""
    [found] = find_candidates([str(folder)], [], SpeedProtocol(**(vars(SHORT) | changes)), None)
    return found


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_a_token_reads_all_but_the_other_rows_of_its_table(dtype: str, width: int, tmp_path: Path) -> None:
    tied = find_candidate(save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True), dtype=dtype)
    assert tied.token_bytes == width * (REST + VOCABULARY * 32)
    own = find_candidate(save_tiny("llama", tmp_path / "own", tie_word_embeddings=False), dtype=dtype)
    assert own.token_bytes == width * (REST + VOCABULARY * 32 + 32)
    assert (own.kind, own.engine, own.vocabulary, own.context) == ("dense", "transformers", VOCABULARY, 64)


def test_positions_are_looked_up_too(tmp_path: Path) -> None:
    """GPT-2: its head is tied to the tokens' table, and it has one of 64 positions."""
    model = find_candidate(save_tiny("gpt2", tmp_path / "gpt2"))
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    everything = 2 * sum(value.numel() for value in stored.values())
    assert model.token_bytes == everything - 2 * 63 * 32


def test_of_experts_those_that_a_token_is_given_count(tmp_path: Path) -> None:
    model = find_candidate(save_zoo("qwen3_moe", tmp_path / "moe", tie_word_embeddings=True))
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    experts = sum(value.numel() for name, value in stored.items() if ".experts." in name)
    everything = sum(value.numel() for value in stored.values())
    assert experts and model.token_bytes == 2 * (everything - experts + experts * 2 // COUNT)


@pytest.mark.parametrize("tied", [True, False])
def test_compressed_tables_count_as_they_are_stored(tied: bool, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=tied)
    steps = [{"method": "rtn", "bits": 4, "group_size": 16}]
    recipe = {"version": 1, "rules": [{"match": "*.mlp.*", "steps": steps}], "embeddings": steps}
    lc.compress(str(dense), recipe, tmp_path / "small")
    files = [load_file(path) for path in (tmp_path / "small").glob("*.safetensors")]
    stored = {name: value for file in files for name, value in file.items()}
    sizes = {name: value.numel() * value.element_size() for name, value in stored.items()}
    table = sizes["model.embed_tokens.weight"]
    assert stored["model.embed_tokens.weight"].dtype == torch.uint8
    found = find_candidate(tmp_path / "small")
    assert found.token_bytes == sum(sizes.values()) - (0 if tied else table - ceil(table / VOCABULARY))
    assert (found.kind, found.dtype, found.scores) == ("compressed", None, None)


@pytest.mark.parametrize("head", [True, False])
def test_headers_of_gguf_files_are_read_as_the_package_reads_them(head: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list(["a", "ß", "<s>"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.truth", True)
    writer.add_tensor("token_embd.weight", np.zeros((48, 64), np.float16))
    writer.add_tensor("blk.0.norm.weight", np.zeros(5, np.float32))
    writer.add_tensor("blk.0.mlp.weight", np.zeros((32, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    if head:
        writer.add_tensor("output.weight", np.zeros((48, 64), np.float16))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    found = read_gguf_header(path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    assert found.sizes.keys() == sizes.keys()
    assert all(0 <= found.sizes[name] - size < 32 for name, size in sizes.items()), "up to the padding"
    assert (found.vocabulary, found.context, found.bytes) == (48, 128, path.stat().st_size)
    assert found.token_bytes == sum(found.sizes.values()) - (47 * 64 * 2 if head else 0)
    few = {"general.architecture": "llama", "llama.expert_count": 8, "llama.expert_used_count": 2}
    mixture = replace(found, entries=few, sizes={"token_embd.weight": 10, "blk.0.ffn_up_exps.weight": 400})
    assert mixture.token_bytes == 10 + 100
    whole = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:150])
    (tmp_path / "short.gguf").write_bytes(whole[: -48 * 64 * 2] if head else whole[: -32 * 34])
    (tmp_path / "other.gguf").write_bytes(b"PK" + whole[2:])
    (tmp_path / "old.gguf").write_bytes(whole[:4] + b"\1\0\0\0" + whole[8:])
    for name, message in (
        ("cut", "breaks off inside its header"),
        ("short", "shorter than its header says"),
        ("other", "not a GGUF file"),
        ("old", "of version 1"),
        ("none", "there is no file"),
    ):
        with pytest.raises(InputError, match=message):
            read_gguf_header(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2))])
def test_no_header_is_believed_blindly(turn: int, tmp_path: Path) -> None:
    """Whatever a byte of the header is changed to, a file is read or refused in a sentence."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    whole = path.read_bytes()
    read = refused = 0
    for place in range(len(whole) - 2 * 32 * 4):
        value = (0, 9, 0xFF)[(place + turn) % 3]
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        try:
            read += read_gguf_header(path).vocabulary > 0
        except InputError:
            refused += 1
    assert read and refused


def test_prompts_are_tokens_of_every_model(tmp_path: Path) -> None:
    wide = find_candidate(save_tiny("llama", tmp_path / "wide", vocab_size=5000))
    narrow = find_candidate(save_tiny("llama", tmp_path / "narrow"))
    drawn = draw_prompt([wide, narrow], 1000, 0)
    assert len(drawn) == 1000 and set(drawn) < set(range(VOCABULARY)) and len(set(drawn)) > VOCABULARY / 2
    assert drawn == draw_prompt([narrow], 1000, 0) != draw_prompt([narrow], 1000, 1)


# --- the machine ----------------------------------------------------------------------------------------------------


def cache(tree: Path, cpu: int, index: int, level: int, kind: str, size: str, shared: str) -> None:
    folder = tree / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", str(level)), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_last_level_caches_of_all_sockets_count_once(tmp_path: Path) -> None:
    for cpu in range(4):
        cache(tmp_path, cpu, 0, 1, "Data", "48K", str(cpu))
        cache(tmp_path, cpu, 1, 1, "Instruction", "64M", str(cpu))
        cache(tmp_path, cpu, 3, 3, "Unified", "32M", "0-1" if cpu < 2 else "2-3")
    assert last_level_cache(tmp_path) == 2 * 32 * 2**20
    assert last_level_cache(tmp_path / "none") is None


def test_the_buffer_is_larger_than_caches_unless_memory_is_short() -> None:
    plenty = 64 * 2**30
    assert buffer_bytes(None, plenty) == (LEAST, None)
    assert buffer_bytes(2**20, plenty) == (LEAST, None)
    assert buffer_bytes(300 * 2**20, plenty) == (1200 * 2**20, None)
    size, note = buffer_bytes(300 * 2**20, 2**30)
    assert size == 2**28 and note is not None and "268 MB" in note


def test_bandwidth_is_that_of_the_fastest_reading() -> None:
    buffer = BandwidthMeter(2**20)
    assert buffer.bytes == 2**20 and float(buffer.values.sum()) == 2**18, "written, so that its pages are there"
    seconds = iter([4.0, 2.0, 0.5, 3.0, 1.0, 8.0])
    ticks = iter([tick for wait in seconds for tick in (100.0, 100.0 + wait)])
    assert buffer.bandwidth(lambda: next(ticks)) == 2**20 / 0.5


def test_a_peak_begins_anew() -> None:
    if not restart_peak():
        pytest.skip("this system does not let a process restart its peak")
    held = resident_memory()
    block = np.ones(2**25)  # 268 MB
    assert peak_memory() >= held + 0.9 * block.nbytes
    del block
    assert peak_memory() >= held + 0.9 * 2**28
    assert restart_peak() and peak_memory() < held + 2**27


def test_a_worker_finds_the_package_beside_which_it_lies() -> None:
    assert (ROOT / "llmcompress" / "__init__.py").is_file()
