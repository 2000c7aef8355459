"""Three hundred damaged checkpoints: not one may load as if nothing had happened, and each must end in a sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llmcompress as lc
from llmcompress.errors import InputError, LLMCompressError
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.files import tensor_files
from llmcompress.models.files.integrity import INDEX
from tests.tiers import tiered
from tests.tiny import save_tiny

RULES: list[dict[str, Any]] = [
    {"match": "*.v_proj", "steps": [{"method": "rtn", "bits": "ternary"}]},
    {"match": "*.mlp.*", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16, "symmetric": False}]},
]
TEXT = "The mill by the river grinds the corn of forty farms. " * 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    dense = save_tiny("llama", folder / "dense", tie_word_embeddings=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD", 20_000)  # several files
        return lc.compress(dense, {"version": 1, "rules": RULES}, folder / "out").folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(Place(str(folder), folder)).state_dict()


# --- damage to the weights: found without the manifest, so after any copy or upload too -----------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def flip_a_bit(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def append(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    path.write_bytes(path.read_bytes() + dice.randbytes(1 + dice.randrange(64)))


def zero_a_page(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    data = bytearray(path.read_bytes())
    start = dice.randrange(len(data))
    data[start : start + 128] = bytes(len(data[start : start + 128]))
    path.write_bytes(data)


def swap_two_shards(folder: Path, dice: random.Random) -> None:
    first, second = dice.sample(shards(folder), 2)
    spare = folder / "spare"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def drop_a_shard(folder: Path, dice: random.Random) -> None:
    dice.choice(shards(folder)).unlink()


def rewrite(folder: Path, dice: random.Random, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Changes one tensor of a shard and writes it as another tool would, keeping its old metadata."""
    path = dice.choice(shards(folder))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, dice.choice(sorted(tensors)))
    save_file(tensors, path, metadata=metadata)


def rename_a_tensor(folder: Path, dice: random.Random) -> None:
    rewrite(folder, dice, lambda tensors, name: tensors.update({f"{name}_old": tensors.pop(name)}))


def lose_a_tensor(folder: Path, dice: random.Random) -> None:
    rewrite(folder, dice, lambda tensors, name: tensors.__delitem__(name))


def reshape_a_tensor(folder: Path, dice: random.Random) -> None:
    rewrite(folder, dice, lambda tensors, name: tensors.update({name: tensors[name][None]}))


def cast_a_tensor(folder: Path, dice: random.Random) -> None:
    rewrite(folder, dice, lambda tensors, name: tensors.update({name: tensors[name].double()}))


def store_nan(folder: Path, dice: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        floats = [key for key, value in tensors.items() if value.is_floating_point()]
        tensors[dice.choice(sorted(floats))].view(-1)[0] = float("nan")

    rewrite(folder, dice, change)


def forget_the_digests(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    save_file(load_file(path), path, metadata={"format": "pt"})


def lead_out_of_the_folder(folder: Path, dice: random.Random) -> None:
    path = dice.choice(shards(folder))
    shutil.copyfile(path, folder.parent / path.name)
    outside = dice.choice([f"../{path.name}", str(folder.parent / path.name)])

    def change(index: dict[str, Any]) -> None:
        names = index["weight_map"]
        index["weight_map"] = {key: outside if value == path.name else value for key, value in names.items()}

    edit_json(folder / INDEX, change)


def misplace_in_the_index(folder: Path, dice: random.Random) -> None:
    def change(index: dict[str, Any]) -> None:
        names = index["weight_map"]
        key = dice.choice(sorted(names))
        names[key] = dice.choice(sorted({*names.values()} - {names[key]}))

    edit_json(folder / INDEX, change)


def invent_in_the_index(folder: Path, dice: random.Random) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"ghost": shards(folder)[0].name}))


def damage_a_layout(folder: Path, dice: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        layers, layouts = (config["quantization_config"][key] for key in ("layers", "layouts"))
        name = dice.choice(sorted(layers))
        match dice.randrange(8):
            case 0:
                del layers[name]
            case 1:
                layouts[layers[name]]["size"][dice.randrange(2)] += 8
            case 2:
                layouts[layers[name]]["tensors"][-1][2] += 8
            case 3:
                layouts[layers[name]]["tensors"].pop()
            case 4:
                layers[f"{name}_too"] = layers[name]
            case 5:
                layers[name] = (layers[name] + 1 + dice.randrange(len(layouts))) % (len(layouts) + 1)
            case 6:
                layouts[layers[name]]["tensors"].reverse()
            case 7:
                header = layouts[layers[name]]["header"]
                header["levels" if "levels" in header else "node"] = dice.choice([2, 3, "dense"])

    edit_json(folder / "config.json", change)


def add_blocks(folder: Path, dice: random.Random) -> None:
    edit_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))


WEIGHTS = [
    flip_a_bit,
    truncate,
    append,
    zero_a_page,
    swap_two_shards,
    drop_a_shard,
    rename_a_tensor,
    lose_a_tensor,
    reshape_a_tensor,
    cast_a_tensor,
    store_nan,
    forget_the_digests,
    lead_out_of_the_folder,
    misplace_in_the_index,
    invent_in_the_index,
    damage_a_layout,
    add_blocks,
]


@pytest.mark.parametrize("seed", tiered(range(200), lambda seed: seed < len(WEIGHTS)))
def test_damaged_weights_do_not_load(whole: Path, tmp_path: Path, seed: int) -> None:
    """Check what is left of the manifest's protection when only the weights and the config travel."""
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    (folder / "manifest.json").unlink()
    damage = WEIGHTS[seed % len(WEIGHTS)]
    damage(folder, random.Random(seed))
    try:
        found = loaded(folder)
    except LLMCompressError as error:
        assert "\n" not in str(error) and ";" in str(error), f"{damage.__name__}: {error}"
        return
    before = loaded(whole)  # a flipped bit in the padding of a header changes nothing
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert damage in (flip_a_bit, zero_a_page)


# --- damage to anything: found by `verify` --------------------------------------------------------------------------


def flip_a_bit_anywhere(folder: Path, dice: random.Random) -> None:
    path = dice.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def delete_anything(folder: Path, dice: random.Random) -> None:
    dice.choice([path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]).unlink()


def add_a_file(folder: Path, dice: random.Random) -> None:
    (folder / dice.choice(["model.safetensors", "pytorch_model.bin", "modeling_x.py"])).write_bytes(dice.randbytes(8))


def change_a_setting(folder: Path, dice: random.Random) -> None:
    changes: list[dict[str, Any]] = [
        {"rms_norm_eps": 0.1},
        {"rope_theta": 5.0},
        {"hidden_act": "relu"},
        {"num_attention_heads": 2},
    ]
    edit_json(folder / "config.json", lambda config: config.update(dice.choice(changes)))


@pytest.mark.parametrize("seed", tiered(range(100), lambda seed: seed < 10))
def test_verify_finds_any_damage(whole: Path, tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    damages = [flip_a_bit_anywhere, flip_a_bit_anywhere, delete_anything, add_a_file, change_a_setting]
    damages[seed % len(damages)](folder, random.Random(seed))
    with pytest.raises(InputError) as found:
        verify(folder, length=16)
    assert "\n" not in str(found.value) and ";" in str(found.value)


@pytest.mark.slow
def test_a_whole_checkpoint_is_verified(whole: Path, tmp_path: Path) -> None:
    found = verify(whole, against=str(whole.parent / "dense"), length=16)
    assert found.files > 4 and found.layers == 14 and found.kl is not None and found.kl > 0 and found.notes == ()
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("The Hub makes one.")
    assert verify(tmp_path / "out", length=16).layers == 14


def test_a_changed_config_does_not_load_beside_its_manifest(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", lambda config: config.update(rms_norm_eps=0.1))
    with pytest.raises(InputError, match=r"config.json is not as it was written"):
        loaded(tmp_path / "out")


def test_what_save_pretrained_writes_is_checked_too(whole: Path, tmp_path: Path) -> None:
    model = load_model(Place("", whole))
    for shard_size in ("50GB", "20KB"):
        folder = tmp_path / shard_size
        model.save_pretrained(folder, max_shard_size=shard_size)
        found = loaded(folder)
        before = loaded(whole)
        assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
        flip = random.Random(3)
        path = flip.choice(shards(folder))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not as it was written"):
            loaded(folder)
        with pytest.raises(InputError, match="is not as it was written"):
            lc.export(folder, tmp_path / "dense", "dense")
        data[-1] ^= 1
        path.write_bytes(data)
        edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=0.1))
        with pytest.raises(InputError, match="is not the one that its weights were written with"):
            lc.export(folder, tmp_path / "dense", "dense")
