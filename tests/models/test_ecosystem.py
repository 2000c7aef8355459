"""Common uses of a Hugging Face checkpoint work on a compressed one as they do on any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import llmcompress as lc
from llmcompress.errors import InputError
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

RULES = [
    {"match": "*.v_proj", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}, {"method": "svd", "rank": 2}]},
]
IDS = torch.arange(30)[None] * 7 % 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ecosystem")
    dense = save_tiny("llama", place / "dense", tie_word_embeddings=True, max_position_embeddings=256)
    embeddings = [{"method": "rtn", "bits": 4}]
    return lc.compress(dense, {"version": 1, "rules": RULES, "embeddings": embeddings}, place / "out").folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("where", ["auto", "disk"])
def test_placed_by_accelerate(where: str, folder: Path, tmp_path: Path) -> None:
    """A block on disk is read when it is its turn; the tied head then, too."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places = "auto" if where == "auto" else {**parts, "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(model), expected)
    if where == "disk":
        assert model.model.layers[1].mlp.up_proj.weight.is_meta
        with pytest.raises(InputError, match="cannot be made dense while it is offloaded"):
            model.dequantize()
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(InputError, match="cannot take adapters in while it is offloaded"):
            lc.fold(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_split_over_devices(folder: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "lm_head": 0}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=places)
    torch.testing.assert_close(logits(model).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))


@pytest.mark.nightly
def test_a_whole_model_compiles_without_a_graph_break(folder: Path) -> None:
    """Its compressed table too, also after it ran otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {length: logits_of(model, IDS[:, :length]) for length in (30, 7, 1)}
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (30, 7):
        torch.testing.assert_close(logits_of(found, IDS[:, :length]), expected[length], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(model, IDS[:, :1]), expected[1], rtol=0.0, atol=0.0)


def test_a_pipeline_generates(folder: Path) -> None:
    write = pipeline("text-generation", model=str(folder), tokenizer=str(folder))
    [found] = write("The mill", max_new_tokens=4, do_sample=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The mill", return_tensors="pt")
    slow = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert found["generated_text"] == tokenizer.decode(slow[0], skip_special_tokens=True)


@pytest.mark.slow
def test_without_llmcompress_transformers_refuses(folder: Path) -> None:
    """Packages on PYTHONPATH alone: Python reads no `.pth` file there, so transformers never hears of the format."""
    program = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    packages = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    words = [sys.executable, "-S", "-c", program, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=packages)
    assert done.returncode != 0 and "MISMATCH" in done.stderr


TASK = """
task: pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.nightly
def test_lm_eval_scores_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own command, with our import before it."""
    (tmp_path / "pairs.yaml").write_text(TASK.format(file=ROOT / "llmcompress" / "evaluation" / "minimal_pairs.jsonl"))
    program = "import llmcompress; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = ["--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "pairs", "--limit", "4"]
    more = ["--include_path", str(tmp_path), "--device", "cpu", "--log_samples", "--output_path", f"{tmp_path}/theirs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, "run", *words, *more], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|pairs" in done.stdout
    # what `eval -o` writes is what lm-eval writes
    protocol = lc.Protocol(windows=1, length=16, tasks=(str(tmp_path / "pairs.yaml"),), limit=4)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    scores = lc.score(folder, protocol, output=tmp_path / "ours")["tasks"]["pairs"]
    theirs, ours = (
        {path.name.partition("_")[0]: path for path in (tmp_path / side).glob("*/*_*.json*")}
        for side in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys() == {"results", "samples"}
    assert {path.parent.name for path in theirs.values()} == {path.parent.name for path in ours.values()}
    before, after = (json.loads(side["results"].read_text()) for side in (theirs, ours))
    assert before.keys() == after.keys() and before["config"].keys() == after["config"].keys()
    for name in ("results", "n-samples", "n-shot", "higher_is_better", "task_hashes", "model_source", "model_name"):
        assert before[name] == after[name], name
    assert before["results"]["pairs"]["acc,none"] == scores["acc"]
    before, after = (side["samples"].read_text().splitlines() for side in (theirs, ours))
    assert len(before) == len(after) == 4
    for one, other in zip(map(json.loads, before), map(json.loads, after)):
        assert one.keys() == other.keys() and one["doc_hash"] == other["doc_hash"] and one["acc"] == other["acc"]


def test_a_dense_model_is_not_compressed_on_the_fly(folder: Path) -> None:
    from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig

    with pytest.raises((ValueError, InputError)):
        AutoModelForCausalLM.from_pretrained(folder.parent / "dense", quantization_config=LLMCompressConfig())
