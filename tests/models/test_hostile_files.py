"""Model folders that were made to do harm: each is one sentence, at once, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.config import check_entries, public_entries
from llmcompress.models.dense.headers import read_headers
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place, _left_out
from llmcompress.models.dense.model import open_source
from llmcompress.models.files import tensor_files
from llmcompress.models.files.checkpoint import manifest
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.integrity import INDEX, SINGLE, weight_files, weight_map
from llmcompress.models.files.reading import MOST_HEADER, MOST_JSON, open_tensors, read_json
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig
from tests.mutations import changed, places, values
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny

LAW = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RECIPE = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("hostile") / "dense", max_shard_size="40KB")


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD", 40_000)  # several files, with an index
        return lc.compress(dense, RECIPE, dense.parent / "out").folder


@pytest.fixture(autouse=True)
def _within_minutes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn a load that hangs into an error."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("this load hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(600 if request.node.get_closest_marker("slow") else 60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def by_transformers(folder: Path) -> None:
    run(AutoModelForCausalLM.from_pretrained(folder))


def by_us(folder: Path) -> None:
    run(load_model(Place(str(folder), folder)))


def opened(folder: Path) -> None:
    found = CompressedCheckpoint(folder)
    for name in found.layouts:
        found.expression(name)


def as_source(folder: Path) -> None:
    found = open_source(Place(str(folder), folder))
    found.skeleton()
    for name in found.tensors:
        found.read(name)


def run(model: Any) -> None:
    with torch.no_grad():
        model(torch.arange(4)[None])


Load = Callable[[Path], None]
OF_COMPRESSED: list[Load] = [by_transformers, by_us, opened]
OF_DENSE: list[Load] = [by_us, as_source]


def copied(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder to damage, without its manifest, as after an upload."""
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    return folder


def refused(load: Load, folder: Path) -> str:
    with pytest.raises(InputError) as found:
        load(folder)
    text = str(found.value)
    assert "\n" not in text and ";" in text and len(text) < 900
    return text


# --- files that are none --------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def deep(path: Path) -> None:
    path.write_text('{"weight_map": ' + "[" * 100_000)


def no_object(path: Path) -> None:
    path.write_text("[1]")


def no_text(path: Path) -> None:
    path.write_bytes(b'{"\xff": 1}')


IRREGULAR = [pipe, folder_instead, device]


@pytest.mark.parametrize("damage", [*IRREGULAR, deep, no_object, no_text])
@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("load", [by_us, opened])
def test_json_of_a_compressed_model(packed: Path, tmp_path: Path, load: Load, name: str, damage: Any) -> None:
    folder = copied(packed, tmp_path)
    damage(folder / name)
    assert name in refused(load, folder)


@pytest.mark.parametrize("damage", [*IRREGULAR, deep, no_object, no_text])
@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("load", OF_DENSE)
def test_json_of_a_dense_model(dense: Path, tmp_path: Path, load: Load, name: str, damage: Any) -> None:
    folder = copied(dense, tmp_path)
    damage(folder / name)
    assert name in refused(load, folder)


@pytest.mark.parametrize("damage", [deep, no_object, no_text])
def test_a_manifest(packed: Path, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    damage(tmp_path / "copy" / MANIFEST)
    assert MANIFEST in refused(opened, tmp_path / "copy")


@pytest.mark.parametrize("name", ["../outside", "/proc/version", "a/../../outside", "a\nb", "", "a//b"])
def test_a_manifest_that_leads_out(packed: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "outside").write_text("not ours")
    entries = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    entries["sha256"][name] = "0"
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(entries))
    assert "which is no file in its folder" in refused(opened, tmp_path / "copy")


def test_a_name_in_a_manifest_is_no_pattern_of_the_hub(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps({"sha256": {"*": "0", "a.b": "0"}}))
    assert _left_out(tmp_path / "copy") == ["[*]", "a.b"]


def test_names_of_another_kind_in_configs(dense: Path, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"auto_map": {"AutoConfig": "a.B"}, "architectures": [{}]}, {"model_type": []}]
    for entries in wrong:
        folder = copied(dense, tmp_path)
        write_config(folder, **entries)
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}}))
        for load in OF_DENSE:
            refused(load, folder)
        with pytest.raises(InputError):
            companions(folder)


@pytest.mark.parametrize("damage", IRREGULAR)
def test_a_manifest_that_is_no_file(packed: Path, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    damage(tmp_path / "copy" / MANIFEST)
    with pytest.raises(InputError, match="is no regular file"):
        manifest(tmp_path / "copy")


@pytest.mark.parametrize("damage", IRREGULAR)
@pytest.mark.parametrize("load", [by_us, opened])
def test_a_shard_of_a_compressed_model(packed: Path, tmp_path: Path, load: Load, damage: Any) -> None:
    folder = copied(packed, tmp_path)
    damage(sorted(folder.glob("*.safetensors"))[-1])
    refused(load, folder)


@pytest.mark.parametrize("damage", IRREGULAR)
@pytest.mark.parametrize("load", OF_DENSE)
def test_a_shard_of_a_dense_model(dense: Path, tmp_path: Path, load: Load, damage: Any) -> None:
    folder = copied(dense, tmp_path)
    damage(sorted(folder.glob("*.safetensors"))[-1])
    refused(load, folder)


def test_a_json_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, MOST_JSON + 1)  # sparse
    with pytest.raises(ValueError, match="more than 64 MiB"):
        read_json(path)


# --- headers of weight files ----------------------------------------------------------------------------------------


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        found: dict[str, Any] = json.loads(file.read(size))
    return found


def write_header(path: Path, header: bytes, claimed: int | None = None) -> None:
    """Put another header before the values of a weight file."""
    content = path.read_bytes()
    values = content[8 + int.from_bytes(content[:8], "little") :]
    size = len(header) if claimed is None else claimed
    path.write_bytes(size.to_bytes(8, "little") + header + values)


@pytest.mark.parametrize("claimed", [MOST_HEADER + 1, 10**8, 2**63, 2**64 - 1])
@pytest.mark.parametrize("load", OF_COMPRESSED)
def test_a_header_that_claims_to_be_huge(packed: Path, tmp_path: Path, load: Load, claimed: int) -> None:
    folder = copied(packed, tmp_path)
    write_header(sorted(folder.glob("*.safetensors"))[0], b"{}", claimed)
    refused(load, folder)


@pytest.mark.slow
def test_a_header_of_a_million_tensors(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path)
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    write_header(sorted(folder.glob("*.safetensors"))[0], json.dumps({f"t{i}": entry for i in range(10**6)}).encode())
    for load in OF_COMPRESSED:
        refused(load, folder)


@LAW
@given(st.data())
@pytest.mark.slow
def test_any_change_of_a_header(dense: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Its tensors are read as the header says, or not at all."""
    path = copied(dense, tmp_path) / SINGLE
    path.unlink(missing_ok=True)
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path, metadata={"format": "pt"})
    header = header_of(path)
    place = data.draw(st.sampled_from(list(places(header))))
    write_header(path, json.dumps(changed(header, place, data.draw(values(header)))).encode())
    try:
        found = read_headers(path.parent)
    except InputError as error:
        assert "\n" not in str(error)
        return
    for name, one in found.items():
        with open_tensors(path) as file:
            try:
                tensor = file.get_tensor(name)
            except (SafetensorError, ValueError, TypeError):  # a dtype that torch lacks
                continue
        assert tuple(tensor.shape) == one.shape


# --- the index ------------------------------------------------------------------------------------------------------


@LAW
@given(st.data())
@pytest.mark.slow
def test_any_change_of_an_index(packed: Path, tmp_path: Path, data: st.DataObject) -> None:
    index = json.loads((packed / INDEX).read_text())
    place = data.draw(st.sampled_from(list(places(index))))
    path = tmp_path / INDEX
    path.write_text(json.dumps(changed(index, place, data.draw(values(index)))))
    try:
        found = weight_map(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(Path(name).name == name for name in found.values())
    assert all(file.parent == tmp_path for file in weight_files(tmp_path))


@pytest.mark.nightly
def test_an_index_of_a_million_entries(packed: Path, dense: Path, tmp_path: Path) -> None:
    for whole, loads in ((packed, OF_COMPRESSED), (dense, OF_DENSE)):
        folder = copied(whole, tmp_path)
        index = json.loads((folder / INDEX).read_text())
        shard = next(iter(index["weight_map"].values()))
        index["weight_map"] |= {f"layer{i}": shard for i in range(10**6)}
        (folder / INDEX).write_text(json.dumps(index))
        for load in loads:
            if load in (by_transformers, by_us) and whole == packed:
                refused(load, folder)


# --- config.json ----------------------------------------------------------------------------------------------------

HUGE: dict[str, list[Any]] = {
    "num_hidden_layers": [-1, 0, 3, 1000, 10**6, 10**12, 2**70, "2", 2.5, [], {}, True],
    "vocab_size": [-1, 0, 265, 10**6, 10**12, 2**70, "x", [1]],
    "hidden_size": [-1, 0, 33, 10**6, 10**12, 2**70, "x"],
    "intermediate_size": [-1, 0, 10**7, 10**12],
    "head_dim": [-1, 0, 10**9, 10**12, "x"],
    "num_attention_heads": [-1, 0, 10**6, 10**12],
    "num_key_value_heads": [-1, 0, 10**6],
}
ENTRIES = [(key, value) for key, found in HUGE.items() for value in found]


def write_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_impossible_sizes(packed: Path, dense: Path, tmp_path: Path, entry: tuple[str, Any]) -> None:
    folder = copied(dense, tmp_path)
    write_config(folder, **dict([entry]))
    for load in OF_DENSE:
        refused(load, folder)
    folder = copied(packed, tmp_path)
    write_config(folder, **dict([entry]))
    refused(by_us, folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "head_dim"])
@pytest.mark.parametrize("size", [-1, 0, 10**12])
def test_impossible_sizes_in_transformers(packed: Path, tmp_path: Path, key: str, size: int) -> None:
    """Those that we refuse before transformers builds a model; a value of another type it refuses itself."""
    folder = copied(packed, tmp_path)
    write_config(folder, **{key: size})
    assert key in refused(by_transformers, folder)


def test_impossible_sizes_of_a_config_inside(packed: Path, dense: Path, tmp_path: Path) -> None:
    inside = {"model_type": "gemma3_text", "num_hidden_layers": 10**6}
    for whole, load in ((dense, by_us), (dense, as_source), (packed, by_us), (packed, opened)):
        folder = copied(whole, tmp_path)
        write_config(folder, model_type="gemma3", text_config=inside)
        assert "num_hidden_layers as '1000000'" in refused(load, folder)


def test_weights_that_transformers_would_load_elsewhere(packed: Path, dense: Path, tmp_path: Path) -> None:
    """The file that is compressed, counted and exported is the one that is loaded and scored."""
    for whole, loads in ((dense, OF_DENSE), (packed, OF_COMPRESSED)):
        folder = copied(whole, tmp_path)
        shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder / "other.safetensors")
        write_config(folder, transformers_weights="other.safetensors")
        for load in loads:
            assert "load the weights in 'other.safetensors'" in refused(load, folder)
    entries = {"model_type": "llama", "transformers_weights": SINGLE}
    check_entries(entries, "config.json")
    assert public_entries(entries) == {"model_type": "llama"}, "outputs have names of their own"


def test_weights_that_are_missing_are_not_drawn_at_random(dense: Path, tmp_path: Path) -> None:
    folder = copied(dense, tmp_path)
    write_config(folder, num_hidden_layers=3)
    assert "lacks weights that its config requires" in refused(by_us, folder)


def quantization(packed: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((packed / "config.json").read_text())["quantization_config"]
    return found


@LAW
@given(st.data())
@pytest.mark.slow
def test_any_change_of_a_quantization_config(packed: Path, data: st.DataObject) -> None:
    entries = quantization(packed)
    place = data.draw(st.sampled_from(list(places(entries))))
    try:
        table = LLMCompressConfig(**changed(entries, place, data.draw(values(entries)))).table()
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(layout.bytes() < 2**20 for layout in table.values())


@pytest.mark.parametrize(
    "sizes",
    [5, [1], {"model.layers.0.mlp.up_proj": 5}, {"model.layers.0.mlp.up_proj": [10**12, 32]}, {"nowhere": [32, 32]}],
    ids=str,
)
def test_sizes_of_no_layer(packed: Path, tmp_path: Path, sizes: Any) -> None:
    for load in (by_transformers, by_us):
        folder = copied(packed, tmp_path)
        write_config(folder, quantization_config=quantization(packed) | {"sizes": sizes})
        refused(load, folder)


@pytest.mark.nightly
@settings(LAW, max_examples=300)
@given(st.data())
def test_any_change_of_a_config(packed: Path, dense: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole, load = data.draw(st.sampled_from([(packed, by_us), (dense, by_us), (dense, as_source)]))
    folder = copied(whole, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    ways = [place for place in places(config) if len(place) < 4]
    drawn = changed(config, data.draw(st.sampled_from(ways)), data.draw(values(config)))
    (folder / "config.json").write_text(json.dumps(drawn))
    try:
        load(folder)
    except InputError as error:
        assert "\n" not in str(error)


BUDGET = """
import resource, sys
from pathlib import Path
from llmcompress.errors import InputError
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.model import open_source
from llmcompress.models.dense.locate import Place
load = {"open": lambda place: open_source(place), "load": lambda place: load_model(place)}[sys.argv[1]]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
whole, *hostile = map(Path, sys.argv[2:])
load(Place(str(whole), whole))
before = peak()
for folder in hostile:
    try:
        load(Place(str(folder), folder))
        print("loaded")
    except InputError as error:
        print("refused:", error)
print(peak() - before)
"""


@pytest.mark.parametrize("family", tiered_nightly(["llama", "gpt2", "opt"], "llama".__eq__))
@pytest.mark.parametrize("how", tiered_nightly(["open", "load"], "load".__eq__))
def test_a_hostile_config_is_refused_in_little_memory(tmp_path: Path, family: str, how: str) -> None:
    """Sizes that a model could have, beside the weights of a tiny one: no more than 500 MB besides what it takes."""
    layers, positions = (
        ("n_layer", "n_positions") if family == "gpt2" else ("num_hidden_layers", "max_position_embeddings")
    )
    whole = save_tiny(family, tmp_path / "whole")
    changes = ({layers: 1000}, {positions: 200_000}, {"vocab_size": 10**8}, {layers: 1000, positions: 200_000})
    folders = [Path(shutil.copytree(whole, tmp_path / str(number))) for number in range(len(changes))]
    for folder, entries in zip(folders, changes, strict=True):
        write_config(folder, **entries)
    words = [sys.executable, "-c", BUDGET, how, str(whole), *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-600:]
    *outcomes, kilobytes = done.stdout.splitlines()
    free = family == "llama"  # its positions are no weights
    assert [one.split(":")[0] for one in outcomes] == ["refused", "loaded" if free else "refused", "refused", "refused"]
    assert int(kilobytes) < 500_000
