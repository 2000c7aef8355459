"""Files of several sizes: a smaller one is a prefix, equal to what is cut from the whole, and alone is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from llmcompress.cli.app import app
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.folder import CompressedStudent
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.formats.export import export
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.identity import binding
from llmcompress.models.files.integrity import files_beyond, weight_files
from llmcompress.surgery.shrink import shrink
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_nested, pack_weight
from llmcompress.weight.modules import CompressedLinear, compressed_modules
from llmcompress.weight.nodes import Dense, Grid, LowRank, RotatedInputs, Sum, Weight
from tests.distillation import miniature
from tests.stand_in_hub import StandInHub
from tests.tiers import tiered

RANKS = (0, 3)
RULES = [
    {"match": "*.o_proj", "steps": [{"method": "rtn", "bits": 2}]},
    {"match": "*.v_proj", "steps": [{"method": "rtn", "bits": 2}, {"method": "svd", "rank": 2, "factor_bits": 16}]},
    {
        "match": "*",
        "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2}, {"method": "eora", "rank": 6, "factor_bits": 4}],
    },
]


LOAD = """
import sys
import torch
import llmcompress
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained("me/nested")
config.quantization_config["rank"] = 3
model = AutoModelForCausalLM.from_pretrained("me/nested", config=config)
with torch.no_grad():
    save_file({"logits": model(torch.arange(24)[None]).logits}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, a checkpoint of one size, `nested`, the same weights in a file of several, and `dense`."""
    place = miniature.make(tmp_path_factory.mktemp("nested"), RULES)
    opened = CompressedCheckpoint(place / "small")
    linears = {name: CompressedLinear.of(opened.expression(name)) for name in opened.layouts if "layers" in name}
    with write_checkpoint(place / "nested") as writer:
        for path in (place / "small").iterdir():
            if path.suffix != ".safetensors" and path.name not in ("manifest.json", "config.json"):
                shutil.copyfile(path, writer.folder / path.name)
        CompressedStudent(opened, RANKS).store(linears, {}, writer)
        writer.close(binding(writer.folder))
    return place


def weight(values: Sequence[int] = (4, 5)) -> Weight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (8, 16), generator=generator, dtype=torch.uint8)
    base = Grid(codes, torch.rand(8, 1, generator=generator).half(), None, 4, 16)
    terms = [
        LowRank(Dense(torch.randn(8, size, generator=generator)), Dense(torch.randn(size, 16, generator=generator)))
        for size in values
    ]
    return RotatedInputs(Sum((base, *terms)), torch.arange(16) % 3 > 0, 16)


@pytest.mark.parametrize("ranks", [(0,), (2, 4), (0, 3, 7), (9,), ()], ids=str)
def test_payloads_of_smaller_sizes_are_prefixes(ranks: tuple[int, ...]) -> None:
    sizes = pack_nested(weight(), ranks)
    whole = sizes[-1].payload
    for rank, (layout, payload) in zip((*ranks, 9), sizes, strict=True):
        assert torch.equal(whole[: layout.bytes()], payload)
        layout.check(payload)
        alone = pack_weight(weight())
        stored = dense(decode(layout.header, layout.views(payload)))
        parts = dense(decode(alone.layout.header, alone.views()))
        cut = [min(rank, 4), max(0, rank - 4)]
        own = weight().inner  # type: ignore[union-attr]
        wanted = [dense(own.parts[0])]
        wanted += [dense(each.left)[:, :k] @ dense(each.right)[:k] for each, k in zip(own.parts[1:], cut, strict=True)]
        turned = dense(RotatedInputs(Dense(torch.stack(wanted).sum(0)), torch.arange(16) % 3 > 0, 16))
        torch.testing.assert_close(stored, turned)
        assert rank < 9 or torch.allclose(stored, parts, atol=1e-6)


@torch.no_grad()
def logits(folder: Path, rank: int | None = None) -> Tensor:
    config = AutoConfig.from_pretrained(folder)
    if rank is not None:
        config.quantization_config["rank"] = rank
    result: Tensor = AutoModelForCausalLM.from_pretrained(folder, config=config)(torch.arange(24)[None]).logits
    return result


@pytest.mark.parametrize("rank", tiered([0, 2, 3, 5], {2, 5}.__contains__))  # within a file, and beyond all
def test_a_prefix_is_what_is_cut_from_the_whole(rank: int, folders: Path, tmp_path: Path) -> None:
    """Byte for byte, without the files of larger sizes; and so in transformers."""
    partial = shutil.copytree(folders / "nested", tmp_path / "partial")
    for name in files_beyond(folders / "nested", rank):
        (partial / name).unlink()
    assert len(weight_files(partial)) == 3 and len(list(partial.glob("*.safetensors"))) == (
        1 if rank == 0 else 2 if rank <= 3 else 3
    )
    done = shrink(partial, rank, tmp_path / "prefix")
    whole = shrink(folders / "small", rank, tmp_path / "cut")
    for name in ("model.safetensors", "config.json", "report.json") if rank <= max(RANKS) else ():
        assert (tmp_path / "prefix" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert done.terms == whole.terms and done.bpw_after == pytest.approx(whole.bpw_after, rel=0.05)
    torch.testing.assert_close(logits(tmp_path / "prefix"), logits(tmp_path / "cut"))
    assert torch.equal(logits(folders / "nested", rank), logits(tmp_path / "prefix"))
    assert torch.equal(logits(partial, rank), logits(tmp_path / "prefix")), "transformers opens the other files"
    report = export(partial, tmp_path / "dense", "dense", rank=rank)
    export(tmp_path / "cut", tmp_path / "other", "dense")
    assert report.bytes_before == sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "other"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name].float(), other[name].float(), rtol=1e-2, atol=1e-3) for name in other)


@pytest.mark.slow
def test_a_file_of_several_sizes_is_a_checkpoint(folders: Path, tmp_path: Path) -> None:
    assert torch.allclose(logits(folders / "nested"), logits(folders / "small"), atol=1e-5)
    assert (
        verify(folders / "nested", windows=1, length=16).layers
        == verify(folders / "small", windows=1, length=16).layers
    )
    model = AutoModelForCausalLM.from_pretrained(folders / "nested")
    assert not any("part_" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(folders / "nested"))
    headed = AutoModelForSequenceClassification.from_pretrained(folders / "nested")
    plain = compressed_modules(AutoModelForSequenceClassification.from_pretrained(folders / "small"))
    for name, module in compressed_modules(headed).items():
        torch.testing.assert_close(dense(module.expression()), dense(plain[name].expression()))
    settings = miniature.recipe(folders, steps=1, rates={"factors": 1e-3})
    again = distill(folders / "nested", folders / "dense", settings, tmp_path / "again")
    assert "nested" not in json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert again.history[0]["kl"] > 0


def test_distilled_sizes_are_in_files_of_their_own(folders: Path, tmp_path: Path) -> None:
    settings = miniature.recipe(folders, steps=2, rates={"scales": 1e-3}, nested=[3, 0])
    done = distill(folders / "small", folders / "dense", settings, tmp_path / "out")
    assert files_beyond(tmp_path / "out", 0) == {f"model-0000{number}-of-00003.safetensors" for number in (2, 3)}
    assert files_beyond(tmp_path / "out", 3) == {"model-00003-of-00003.safetensors"}
    assert not files_beyond(tmp_path / "out", 4) and not files_beyond(tmp_path / "out", None)
    kl = verify(tmp_path / "out", str(folders / "dense"), folders / "text.txt", windows=1, length=32).kl
    assert kl is not None and done.bytes_after == sum(
        layout.bytes() for layout in CompressedCheckpoint(tmp_path / "out").layouts.values()
    )


def test_damage_of_a_prefix_is_one_sentence(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "nested", tmp_path / "out")
    small, middle, large = weight_files(tmp_path / "out")
    large.write_bytes(b"nothing")
    shrink(tmp_path / "out", 3, tmp_path / "small")  # which does not read it
    with pytest.raises(InputError, match="model-00003-of-00003.safetensors is not as it was written; download"):
        shrink(tmp_path / "out", 5, tmp_path / "large")
    (tmp_path / "out/manifest.json").unlink()
    middle.write_bytes(middle.read_bytes()[:-8])
    with pytest.raises(InputError, match="model-00002-of-00003.safetensors is damaged"):
        shrink(tmp_path / "out", 3, tmp_path / "cut")
    small.unlink()
    said = CliRunner().invoke(app, ["shrink", str(tmp_path / "out"), "--rank", "0", "-o", str(tmp_path / "no")])
    assert said.exit_code == InputError.exit_code and len(said.stderr.strip().splitlines()) == 1
    with pytest.raises(RecipeError, match="a rank of -1 is none"):
        shrink(tmp_path / "out", -1, tmp_path / "no")


@pytest.mark.parametrize(
    "nested", [{"x": []}, {"9" * 5000: []}, {"1": {}}, {"-1": []}, ["1"], {"1": []}], ids=lambda case: str(case)[:12]
)
def test_sizes_that_are_none_are_refused(nested: Any, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "nested", tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    entries = json.loads((tmp_path / "out/config.json").read_text())
    entries["quantization_config"]["nested"] = nested
    (tmp_path / "out/config.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"config\.json"):
        CompressedCheckpoint(tmp_path / "out", rank=0)
    with pytest.raises(InputError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_smaller_size_of_a_hub_model_is_downloaded_alone(folders: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    files = {path.name: path.read_bytes() for path in (folders / "nested").iterdir()}
    with StandInHub() as hub:
        hub.commit("me/nested", files | {".gitattributes": b"*.safetensors filter=lfs", "README.md": b"a card"})
        hub.commit("me/dense", {path.name: path.read_bytes() for path in (folders / "dense").iterdir()})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        words = [
            sys.executable,
            "-m",
            "llmcompress",
            "shrink",
            "me/nested",
            "--rank",
            "3",
            "-o",
            str(tmp_path / "small"),
        ]
        subprocess.run(words, env=environment, check=True)
        loaded = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and "/resolve/" in path}
        assert loaded == files.keys() - {"model-00003-of-00003.safetensors"}
        hub.asked.clear()
        shutil.rmtree(tmp_path / "home")
        subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "logits")], env=environment, check=True)
        loaded = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and "/resolve/" in path}
        assert {name for name in loaded if name.endswith(".safetensors")} == {
            f"model-0000{number}-of-00003.safetensors" for number in (1, 2)
        }
        words[4:] = ["me/dense", "--rank", "3", "-o", str(tmp_path / "no")]
        refused = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert refused.returncode == InputError.exit_code and "holds no model compressed by" in refused.stderr
        assert not any("me/dense" in path and path.endswith(".safetensors") for _, path in hub.asked)
    assert torch.equal(logits(tmp_path / "small"), logits(folders / "nested", 3))
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], logits(folders / "nested", 3))
