"""The commands of the documents run as they are written, on tiny models in the place of those that they name."""

from __future__ import annotations

import gzip
import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.recipe.read import read_recipe
from tests.formats.gguf_files import tiny_llama
from tests.rules.documents import DOCUMENTS, blocks, commands
from tests.tiers import tiered_nightly

# Words of commands that need data or a model of the Hub, a repository to push to, or a model that has learned.
ELSEWHERE = {"arc_easy", "arc_easy,hellaswag", "org/another-lora", "Qwen/Qwen3-30B-A3B", "model.gguf", "push"}
ELSEWHERE |= {"passport", "--kl", "target.engine=vllm"}
PAGES = [name for name in DOCUMENTS if commands(name) and not name.startswith(("docs/reference/", "docs/install"))]
SIZES = {"40MB": "1MB", "50MB": "1MB", "5GB": "1MB", "1.25,1.6,2,2.5,3": "3,4"}  # of a tiny model
BLOCKS = {"docs/how-to/drop-blocks.md": 20}  # that commands of the page name
WIDER = {"docs/how-to/for-exllamav3.md": {"hidden_size": 128, "num_key_value_heads": 4}}  # sides that 128 divides
WIDER["docs/how-to/hit-a-size.md"] = {"num_key_value_heads": 4}  # a recipe of the page has terms of 64 components
SHORT = ("calibration.samples=4", "calibration.length=32", "calibration.held_out=1", "gates.kl=null")
LESSON = ("steps=2", "batch=4", "micro_batch=2", "evaluate_every=1")
TASKS = {
    "piqa_valid.jsonl": {"goal": "grind corn", "sol1": "use a mill", "sol2": "use a river", "label": 0},
    "lambada_test.jsonl": {"text": "the mill grinds corn"},
    "blimp/agreement.jsonl": {"sentence_good": "The mill grinds.", "sentence_bad": "The mill grind."},
    "gsm8k_test.jsonl": {"question": "How much is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "humaneval.jsonl": {
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    },
}
TEXT = "The mill by the river grinds corn. " * 200


@pytest.fixture
def place(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny models under the names of the documents, compressed ones, recipes, and texts."""
    monkeypatch.chdir(tmp_path)
    dense = tmp_path / "smollm2"
    sizes = {"intermediate_size": 128, "hidden_size": 64, "num_hidden_layers": BLOCKS.get(document, 2)}
    sizes |= WIDER.get(document, {})
    tiny_llama(dense, max_position_embeddings=2048, tie_word_embeddings=True, **sizes)
    shutil.copytree(dense, tmp_path / "org" / "model")
    for name in ("small", "smaller", "recovered"):
        lc.compress(dense, read_recipe("gptq-4-g64", list(SHORT)), tmp_path / name)
    recipe = next(text for text in blocks("yaml", "docs/quickstart.md") if "version" in text)
    own = next((text for text in blocks("yaml", document) if "version" in text), recipe)
    (tmp_path / "recipe.yaml").write_text(own)
    (tmp_path / "other.yaml").write_text(recipe)
    (tmp_path / "mine.txt").write_text(TEXT)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mills.txt").write_text(TEXT)
    chat = {"messages": [{"role": "user", "content": "What grinds corn?"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(chat) + "\n")
    chat["messages"].append({"role": "assistant", "content": "The mill."})
    (tmp_path / "chats-with-answers.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "mills.jsonl.gz").write_bytes(gzip.compress(f"{json.dumps(chat)}\n".encode() * 40))
    for name, item in TASKS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(item) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", tiered_nightly(PAGES, "docs/how-to/for-llama-cpp.md".__eq__))
def test_commands_run(document: str, place: Path) -> None:
    errors = []
    for words in commands(document):
        if words[0] == "llmcompress" and not ELSEWHERE & {*words}:
            words = shorten([SIZES.get(word, word) for word in words[1:]])
            if "-o" in words:  # a page's commands may name one output twice
                shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
            result = CliRunner().invoke(app, words)
            if result.exit_code:
                errors.append(f"{shlex.join(words)}: {result.output[-300:]}")
    assert not errors, "\n".join(errors)


def shorten(words: list[str]) -> list[str]:
    """Return a command with settings behind its own that make it short."""
    name, more = words[0], list[str]()
    if name in ("compress", "plan", "frontier") and "data-free" not in words:
        more = [part for setting in SHORT for part in ("--set", setting)]
    if name == "distill":
        data = "data=[{name: mine, dataset: mine.txt, samples: 6, length: 32, held_out: 2}]"
        more = [part for setting in (data, *LESSON) for part in ("--set", setting)]
    if name in ("eval", "compare", "drift"):
        more = ["--length", "64", *(["--windows", "2"] if "--windows" not in words else [])]
    if name == "bench":
        more = ["--prompt", "8", "--tokens", "4", *(["--rounds", "2"] if "--rounds" not in words else [])]
    if name == "answer":
        more = ["--longest", "8"]
    return [*words, *more]
