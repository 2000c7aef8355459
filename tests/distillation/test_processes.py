"""Two processes learn what one learns, with whole models (DDP), in shares (FSDP2), and with the optimizer's part in
shares (DeepSpeed); and they resume what was interrupted."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.distillation.parallel.launch import check_sharding
from llmcompress.errors import RecipeError
from llmcompress.models.files import file_names
from llmcompress.recipe.distillation import Distillation
from tests.distillation.launched import free_port, run
from tests.distillation.miniature import TEXT
from tests.rules.source_tree import ROOT
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny
from tests.zoo import save_zoo

RULES = [
    {"match": "*.q_proj", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {
        "match": "*.down_proj",
        "steps": [{"method": "rtn", "bits": 2, "group_size": 16}, {"method": "svd", "rank": 2, "factor_bits": 16}],
    },
    {"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 16}]},
]
ALL = {"codes": 1e-2, "scales": 5e-3, "factors": 5e-3, "values": 2e-3, "norms": 2e-3}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="an extra")
COMMON = ("short", "whole", "narrow", "phased", "median", "controlled", "cached", "second-hand", "own", "nested")
ALWAYS = ("short", "whole", "cut", "resumed", "kept", "moved", "other", "unlike", "no-cache")
launches = pytest.mark.slow  # two processes that have to import everything
CONFIGS = ROOT / "configs" / "accelerate"
ENGINES = {"ddp": "cpu-ddp.yaml", "fsdp2": "fsdp2.yaml", "deepspeed": "deepspeed.yaml"}


def nightly(names: Iterable[str]) -> list[Any]:
    """Return values of a parameter, all of them nightly."""
    return tiered_nightly(names, lambda name: False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `dense` and `tied`, small ones made from them; a `deep` one, a small one with fewer blocks; a text."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    data = {"dataset": str(folder / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    compression = {"version": 1, "rules": RULES, "calibration": data}
    save_tiny("llama", folder / "tied", tie_word_embeddings=True)
    save_tiny("llama", folder / "dense", attention_bias=True)
    lc.compress(folder / "tied", compression | {"embeddings": [{"method": "rtn", "bits": 4}]}, folder / "tied-small")
    lc.compress(folder / "dense", compression, folder / "dense-small")
    other = {"version": 1, "rules": RULES[-1:], "calibration": data | {"seed": 1}}
    lc.compress(folder / "tied", other, folder / "tied-2")
    ternary = [{"match": "*", "steps": [{"method": "rtn", "bits": "ternary", "group_size": 16}]}]
    lc.compress(folder / "tied", compression | {"rules": ternary}, folder / "ternary")
    save_tiny("llama", folder / "deep", num_hidden_layers=3)
    lc.drop_blocks(folder / "deep", [1], folder / "deep-small")
    save_tiny("llama", folder / "narrow", seed=1, hidden_size=16)
    return folder


def jobs(place: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Distillations by name.

    `cut` is interrupted and `resumed` resumes it; `kept`, `clipped` and `confined` leave their states, `finished` is
    what becomes of the first, and `moved` what becomes of it elsewhere.
    """

    def job(output: str, model: str = "tied", stop: list[int] | None = None, **more: Any) -> dict[str, Any]:
        data = {"dataset": str(place / "text.txt"), "samples": 28, "length": 32, "held_out": 4}
        exact = {"batch": 4, "micro_batch": 1, "evaluate_every": 1, "compute": "float32", "steps": 4}
        recipe = {"version": 1, "data": data, "rates": ALL} | exact | more
        folders = {"student": str(place / f"{model}-small"), "teacher": str(place / model)}
        return folders | {"output": str(out / output), "recipe": recipe, "stop": stop, "port": free_port()}

    first, last = [0, 1], [1, 1]  # which process is stopped, and after which step
    stateful = {"losses": [{"of": {"loss": "taid"}}], "save_every": 1000}
    text = {"dataset": str(place / "text.txt"), "samples": 10, "length": 32, "held_out": 2}
    domains = [text | {"name": "one"}, text | {"name": "other", "length": 24}]
    mixed = {"data": domains, "mixture": {"reweight": "ddk", "every": 2, "sequences": 1}}
    plain = {"rates": {kind: ALL[kind] for kind in ("codes", "scales", "norms")}}  # its student has no more kinds
    compressed_teacher = job("second-hand", losses=[{"of": {"loss": "dad"}}], checkpointing=True, **plain, **mixed)
    hidden = {"of": {"loss": "hidden"}, "weight": {"from": 1.0, "to": 0.1}, "layers": [0, 2]}
    two = {"kind": "end_to_end", "steps": 2}
    between = {"losses": [{"of": {"loss": "forward_kl"}}, hidden], "checkpointing": True}
    through = {"of": {"loss": "hidden"}, "layers": [[1, 2]]}  # a linear, since widths differ
    early: dict[str, Any] = {
        "losses": [{"of": {"loss": "forward_kl"}}, through, {"of": {"loss": "ofa"}, "exits": [1, 2], "branch": True}],
        "rates": {"weights": 1e-2, "norms": 1e-2, "projections": 1e-2},
    }
    medians = {"latents": "teacher", "scales": "median", "rates": {"codes": 1e-4, "norms": 1e-2}}
    narrow = {"student": str(place / "narrow")}
    return {
        "narrow": job("narrow", "deep", checkpointing=True, **early) | narrow,
        "narrow-kept": job("narrow-kept", "deep", stop=first, clip=1e3, **early) | narrow,
        "short": job("short", "deep", rates={"weights": 1e-2, "norms": 1e-2}, **between),
        "whole": job("whole", **stateful),
        "cut": job("cut", stop=last, **stateful),
        "resumed": job("cut", **stateful),
        "kept": job("kept", "dense", stop=first, clip=1e3),
        "finished": job("finished", "dense", clip=1e3),
        "moved": job("moved", "dense", clip=1e3),
        "other": job("kept", "dense", steps=5),
        "clipped": job("clipped", "dense", stop=first, clip=1e-3),
        "confined": job("confined", "dense", stop=first, rates={"codes": 0.4}, warmup=0, clip=1e3),
        "phased": job("phased", phases=[two | {"rates": {"norms": 1e-2}}, two]),
        "median": job("median", **medians) | {"student": str(place / "ternary")},
        "controlled": job("controlled", losses=[{"of": {"loss": "reverse_kl"}}], controls=["no_teacher", "vanilla"]),
        "own": job("own", losses=[{"of": {"loss": "reverse_kl"}}], on_policy={"prompt": 4, "every": 3}),
        "cached": job("cached", teacher={"kind": "cached", "k": 16}, losses=[{"of": {"loss": "taid"}}]),
        "nested": job("nested", nested=[1, 0], batch=6, micro_batch=1),
        "coarse": job("coarse", teacher={"bits": 4}, losses=[*between["losses"][:1], {"of": {"loss": "hidden"}}]),
        "unlike": job("unlike") | {"student": [str(place / name) for name in ("tied-small", "tied-2")]},
        "no-cache": job("no-cache", teacher={"kind": "cached", "folder": str(place / "dense")}),
        "second-hand": compressed_teacher | {"teacher": str(place / "tied-small"), "student": str(place / "tied-2")},
    }


def launch_environment(config: str, **more: str) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file CONFIG` sets for its processes."""
    words = ["--config_file", str(CONFIGS / config), "-m", "llmcompress", "distill"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ""  # so does the command that launches
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))} | more


def answers(engine: str, asked: list[dict[str, Any]], out: Path) -> list[list[dict[str, Any]]]:
    """Run the jobs in two processes and return what each says of them."""
    (out / "jobs.json").write_text(json.dumps(asked))
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"} | launch_environment(ENGINES[engine])
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    script = [str(ROOT / "tests" / "distillation" / "launched.py"), str(out / "jobs.json"), str(out)]
    done = subprocess.run([sys.executable, *torchrun, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


class Answers(dict[str, Any]):
    """Results of jobs in one process, each of which is run when it is first asked for."""

    def __init__(self, asked: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.asked = asked

    def __missing__(self, name: str) -> Any:
        self[name] = run(self.asked[name])
        return self[name]


@pytest.fixture(scope="module")
def alone(place: Path) -> tuple[Path, Answers]:
    """The folder of the jobs' outputs, and what comes of them in one process."""
    return place / "alone", Answers(jobs(place, place / "alone"))


def compared(request: pytest.FixtureRequest) -> set[str]:
    """Return the names of jobs that the selected tests compare."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return {case["name"] for case in cases if case.get("together") == request.param and "name" in case}


@pytest.fixture(scope="module", params=tiered_nightly(["ddp", "fsdp2", "deepspeed"], "fsdp2".__eq__))
def together(request: pytest.FixtureRequest, place: Path, alone: Any) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder of the jobs' outputs, and what each of two processes says of them."""
    if request.param == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    out = place / request.param
    out.mkdir()
    asked = jobs(place, out)
    few = {*ALWAYS, *compared(request)} if request.param == "fsdp2" else asked.keys() - {"finished"}
    asked = {name: job for name, job in asked.items() if name in few}
    assert alone[1]["kept"]
    shutil.copytree(alone[0] / "kept.training", out / "moved.training")
    first, second = answers(request.param, list(asked.values()), out)
    return out, dict(zip(asked, map(list, zip(first, second, strict=True)), strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def measured(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, except times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in {"seconds", "tokens_per_second"}} for row in rows]


@launches
@pytest.mark.parametrize(
    "name",
    [*COMMON[:2], *nightly(COMMON[2:]), pytest.param("coarse", marks=[pytest.mark.nightly, needs_bitsandbytes])],
)
def test_two_processes_learn_the_same_as_one(name: str, alone: Any, together: Any) -> None:
    refused = {
        "cached": "a single process caches a teacher",
        "coarse": "{bits: 4} requires a whole teacher",
        "phased": "give each phase a recipe of its own",
        "own": "a student that is sharded cannot write",
        "median": "scales: median requires whole groups of latents",
    }
    if name in refused and together[0].name == "fsdp2":
        assert all(refused[name] in found["error"] for found in together[1][name])
        return
    wanted = alone[1][name]["history"]
    first = 1 if name == "median" else 0  # the step in which scales become medians
    assert wanted[-1]["kl"] < wanted[first]["kl"]
    for found in together[1][name]:
        for one, other in zip(wanted, found["history"], strict=True):
            for key in {"kl", "perplexity", "loss"} & one.keys():
                assert math.isclose(one[key], other[key], rel_tol=1e-5, abs_tol=1e-7), key
        for control, last in alone[1][name]["controls"].items():
            assert math.isclose(last["kl"], found["controls"][control]["kl"], rel_tol=1e-5, abs_tol=1e-7), control
    for one, other in zip(measured(alone[0] / name), measured(together[0] / name), strict=True):
        assert one.keys() == other.keys() and one["tokens"] == other["tokens"]
        for key in {"kl", "loss", "gradient_norm"} & one.keys():
            assert math.isclose(one[key], other[key], rel_tol=1e-5, abs_tol=1e-7), key
    ours, theirs = weights(alone[0] / name), weights(together[0] / name)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if value.dtype == torch.uint8:  # codes, and scales that may have been rounded to either side
            assert float((value != theirs[key]).float().mean()) < 1e-3, key
        else:
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)


@launches
@pytest.mark.parametrize("name", ["short", "whole", "kept", *nightly(["narrow", "second-hand"])])
def test_every_process_begins_with_the_weights_of_one(name: str, alone: Any, together: Any) -> None:
    """Bit for bit, of student and teacher."""
    assert {each["held"]["digest"] for each in together[1][name]} == {alone[1][name]["held"]["digest"]}


@pytest.mark.nightly
@launches
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_models_are_in_memory_no_more_than_they_have_to(engine: str, place: Path, tmp_path: Path) -> None:
    """Of sharded models, the first process alone has whole ones; with whole ones in each, loading takes no second."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux, which says how much memory is a process's own")
    save_tiny("llama", tmp_path / "large", hidden_size=448, intermediate_size=1280, num_hidden_layers=8)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "large")
    grid = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 64}]}]
    lc.compress(tmp_path / "large", {"version": 1, "calibration": None, "rules": grid}, tmp_path / "large-small")
    small = jobs(place, tmp_path)["whole"]
    small["recipe"] |= {"steps": 1, "rates": {"codes": 1e-3}}
    folders = {"student": str(tmp_path / "large-small"), "teacher": str(tmp_path / "large")}
    large = small | folders | {"output": str(tmp_path / "out"), "port": free_port()}
    found = answers(engine, [small, large], tmp_path)
    first, second = (each[-1]["held"] for each in found)
    assert first["bytes"] > 1e8 and first["digest"] == second["digest"]
    # the small one takes what does not grow with models: imports, and connections between processes
    shares = [(big["held"]["memory"] - few["held"]["memory"]) / first["bytes"] for few, big in found]
    assert 0.6 < shares[0] < 1.5, shares
    assert 0.6 < shares[1] < 1.5 if engine == "ddp" else shares[1] < 0.2, shares


@launches
@pytest.mark.parametrize("name", ["kept", *nightly(["clipped", "confined", "narrow-kept"])])
def test_moments_equal_those_of_one_process(name: str, alone: Any, together: Any) -> None:
    """They are sums of gradients, so that a wrong factor shows, which the steps of Adam hide."""
    assert alone[1][name]
    states = [next((folder / f"{name}.training").glob("*.safetensors")) for folder in (alone[0], together[0])]
    ours, theirs = map(load_file, states)
    assert ours.keys() == theirs.keys() and any(key.startswith("exp_avg.") for key in ours)
    if name == "confined":
        codes = torch.cat([value for key, value in theirs.items() if key.startswith("value.")])
        assert 0.05 < float((codes == -0.5).float().mean()) < 0.5  # those that would have left it are at the edge
    norms = {}
    for kind in ("value", "exp_avg", "exp_avg_sq"):
        [one, other] = [
            torch.cat([v.flatten() for k, v in s.items() if k.startswith(f"{kind}.")]) for s in (ours, theirs)
        ]
        norms[kind] = float(one.norm())
        assert float((one - other).norm()) <= 1e-5 * norms[kind], kind
    limit = 1e-3 * (1 - 0.9**2)  # what two clipped gradients can add up to
    assert norms["exp_avg"] <= limit if name == "clipped" else norms["exp_avg"] > 2 * limit


@launches
def test_a_signal_to_one_process_stops_all_and_resuming_is_exact(together: Any) -> None:
    out, found = together
    for cut, resumed in zip(found["cut"], found["resumed"], strict=True):
        assert cut["seen"] == [1, 2] and "step 2 is kept in" in cut["error"]
        assert resumed["seen"] == [3, 4]
    for name in ("whole", "resumed"):
        assert all(len(each["history"]) == 5 for each in found[name])
    histories = [[{**row, "seconds": 0} for row in found[name][0]["history"]] for name in ("whole", "resumed")]
    assert histories[0] == histories[1]
    assert measured(out / "whole") == measured(out / "cut")
    ours, theirs = weights(out / "whole"), weights(out / "cut")
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert not (out / "cut.training").exists()


@launches
def test_two_processes_resume_the_state_of_one(alone: Any, together: Any) -> None:
    wanted = alone[1]["finished"]["history"]
    for found in together[1]["moved"]:
        assert found["seen"] == [3, 4]
        for one, other in zip(wanted, found["history"], strict=True):
            assert math.isclose(one["kl"], other["kl"], rel_tol=1e-5)


@launches
def test_every_process_refuses_the_state_of_another_run(together: Any) -> None:
    for found in together[1]["other"]:
        assert (
            found["error"].startswith("InputError: ")
            and "was left by a different run (recipe changed)" in found["error"]
        )


@launches
def test_processes_with_different_arguments_are_refused(together: Any) -> None:
    out, found = together
    sentence = "process 1 of 2 was started with other student than process 0"
    assert all(sentence in each["error"] for each in found["unlike"])
    assert not list(out.glob("unlike*"))


@launches
def test_every_process_raises_the_error_of_a_cache(alone: Any, together: Any) -> None:
    out, found = together
    whole = out.name != "fsdp2"
    sentence = "is not a cache of a teacher's" if whole else "a single process caches a teacher"
    assert all(sentence in each["error"] for each in found["no-cache"])
    if whole:
        assert not (out / "cached.teacher").exists()
        for each in found["cached"]:
            for when, bias in alone[1]["cached"]["cache_bias"].items():
                assert each["cache_bias"][when] == pytest.approx(bias, rel=1e-4)


@launches
@pytest.mark.parametrize("name", nightly(["second-hand"]))
def test_a_compressed_teacher_is_warned_of(name: str, alone: Any, together: Any) -> None:
    for found in (alone[1], {job: each[0] for job, each in together[1].items()}):
        assert not found["whole"]["warnings"]
        [said] = found[name]["warnings"]
        assert said.startswith("the teacher is compressed too")
    written = json.loads((together[0] / name / file_names.REPORT).read_text())
    assert said in written["warnings"]


@pytest.mark.slow
def test_latents_can_start_at_a_compressed_teacher(place: Path, tmp_path: Path) -> None:
    asked = jobs(place, tmp_path)["second-hand"]
    asked["recipe"] |= {"rates": {"codes": 1e-3}, "latents": "teacher", "steps": 1, "checkpointing": False}
    assert set(run(asked)["trained"]) == {"codes"}


@launches
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_experts_that_no_token_of_a_step_reaches(engine: str, place: Path, tmp_path: Path) -> None:
    """Each process reads one sequence, whose last tokens choose one of sixteen experts."""
    save_zoo("qwen3_moe", tmp_path / "moe", num_experts=16, num_experts_per_tok=1)
    data = {"dataset": str(place / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    lc.compress(tmp_path / "moe", {"version": 1, "rules": RULES[-1:], "calibration": data}, tmp_path / "moe-small")
    asked = jobs(place, tmp_path)["whole"] | {"student": str(tmp_path / "moe-small"), "teacher": str(tmp_path / "moe")}
    short = asked["recipe"]["data"] | {"length": 4}
    asked["recipe"] |= {
        "losses": [{"of": {"loss": "forward_kl"}}],
        "data": short,
        "rates": {"codes": 1e-2, "scales": 5e-3},
    }
    wanted = run(asked | {"output": str(tmp_path / "alone")})["history"]
    near = 1e-5 if engine == "ddp" else 2e-3  # FSDP2 gives an expert that none reaches zeros, and its momentum goes on
    for found in answers(engine, [asked], tmp_path):
        for one, other in zip(wanted, found[0]["history"], strict=True):
            assert math.isclose(one["kl"], other["kl"], rel_tol=near)


@launches
def test_student_and_teacher_are_shared_out(together: Any) -> None:
    out, found = together
    for name in found.keys() & {"narrow", "short", "whole", "kept", "second-hand"}:
        blocks = [2, 3] if name in {"narrow", "short"} else [2, 2]
        assert found[name][0]["held"]["blocks"] == (blocks if out.name == "fsdp2" else [0, 0])
        for model in ("student", "teacher"):
            held = [each["held"][model] for each in found[name]]
            if out.name != "fsdp2":
                assert all(each["here"] == each["all"] for each in held)
                continue
            assert all(each["whole"] == 0 for each in held)
            assert sum(each["here"] for each in held) == held[0]["all"]
            assert all(0.4 < each["here"] / each["all"] < 0.6 for each in held)
    assert found["whole"][0]["held"]["payloads"]["all"] > 0  # of a packed table


@launches
def test_the_optimizers_part_is_shared_out(alone: Any, together: Any) -> None:
    out, found = together
    for name in ("short", "whole"):
        trained = sum(alone[1][name]["trained"].values())
        for each in found[name]:
            pieces = each["held"].get("pieces", 0)
            assert trained / 2 <= pieces < 0.51 * trained if out.name == "deepspeed" else pieces == 0


@pytest.mark.nightly
@launches
def test_accelerate_launches_the_command(place: Path, alone: Any, tmp_path: Path) -> None:
    """`accelerate launch --config_file configs/accelerate/cpu-ddp.yaml -m llmcompress distill ...`"""
    job = jobs(place, tmp_path)["whole"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(job["recipe"]))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu-ddp.yaml"), "-m", "llmcompress"]
    words = ["distill", job["student"], str(tmp_path / "recipe.yaml"), "--teacher", job["teacher"]]
    output = ["-o", str(tmp_path / "out"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *words, *output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    both, wanted = json.loads(done.stdout), alone[1]["whole"]
    assert both["tokens"] == wanted["tokens"] and both["steps"] == 4
    assert math.isclose(both["history"][-1]["kl"], wanted["history"][-1]["kl"], rel_tol=1e-5)
    assert (tmp_path / "out" / "manifest.json").is_file() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configs_are_accelerates(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = launch_environment(config)
    assert ("fsdp" in config) == (environment.get("ACCELERATE_USE_FSDP") == "true")
    assert ("deepspeed" in config) == (environment.get("ACCELERATE_USE_DEEPSPEED") == "true")
    if "fsdp" in config:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        check_sharding(sharding(FullyShardedDataParallelPlugin()), Distillation())


def sharding(plugin: FullyShardedDataParallelPlugin) -> Any:
    """As much of an Accelerator that shards as is asked."""
    return SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"fsdp_version": 1}, "fsdp_version: 1"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: true"),
        ({"cpu_offload": True}, "fsdp_offload_params: true"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: true"),
    ],
)
def test_other_ways_to_shard_are_refused(
    settings: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plug-in writes it
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "sync_module_states": False} | settings)
    with pytest.raises(RecipeError, match=sentence):
        check_sharding(sharding(plugin), Distillation())


@pytest.mark.parametrize(
    "more",
    [
        {"phases": [{"kind": "end_to_end"}, {"kind": "end_to_end"}]},
        {"adapt": {"rank": 2, "factor_bits": 8}},
    ],
)
def test_phases_after_sharding_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="give each phase a recipe of its own, and factor_bits: 16"):
        check_sharding(sharding(FullyShardedDataParallelPlugin(fsdp_version=2)), Distillation(**more))
