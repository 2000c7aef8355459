"""Streams, names and folders that a command cannot use: sentences and exit codes, never tracebacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress import __version__
from llmcompress.cli.app import app
from llmcompress.cli.terminal import Terminal, build_table
from llmcompress.errors import DiskError, InputError
from tests.rules.source_tree import ROOT
from tests.tiers import tiered
from tests.tiny import save_tiny

RECIPE = "version: 1\nrules: [{match: '*', steps: [{method: rtn, bits: 3, group_size: 24}]}]\n"
LONG = "x" * 300


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of a shell, in which `llmcompress` is the command of this clone."""
    program = f'llmcompress() {{ "{sys.executable}" -m llmcompress "$@"; }}; {command}'
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        ["bash", "-c", program], cwd=folder, env=variables, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--help", "recipes", "recipes --json"])
def test_a_full_output_is_a_sentence(words: str, tmp_path: Path) -> None:
    done = shell(f"llmcompress {words} > /dev/full", tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "[4] standard output cannot be written (No space left on device); send it to another place\n"
    )


def test_a_closed_output_is_refused_before_work(tmp_path: Path) -> None:
    done = shell("llmcompress compress smollm2 gptq-4-g64 -o out >&-", tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith("[4] standard output is closed") and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_with_closed_streams_no_file_takes_their_numbers(tmp_path: Path) -> None:
    """Otherwise what is printed goes into the next file that is opened, such as one of weights."""
    program = (
        "import sys, os; from llmcompress.cli.process import run_program\n"
        "def work():\n"
        "    with open('made', 'w') as file:\n"
        "        assert file.fileno() > 2, file.fileno()\n"
        "        os.write(1, b'lost')\n"
        "sys.argv.append('--quiet'); sys.exit(run_program(work))"
    )
    done = shell(f'"{sys.executable}" -c "{program}" <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0 and (tmp_path / "made").read_text() == ""


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    done = shell("llmcompress recipes | true; exit ${PIPESTATUS[0]}", tmp_path)
    assert done.returncode in (0, 1) and done.stderr == ""


@pytest.mark.parametrize("encoding", tiered(["latin-1", "ascii"], lambda encoding: encoding == "ascii"))
def test_characters_that_an_output_lacks_are_escaped(encoding: str, tmp_path: Path) -> None:
    done = shell("llmcompress $'m\\xc3\\xb6-\\xe2\\x80\\xa6'", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (2, "")
    done = shell("llmcompress --help; llmcompress recipes", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gptq-4-g64" in done.stdout


def test_a_removed_folder_is_named(tmp_path: Path) -> None:
    done = shell("mkdir gone; cd gone; rmdir ../gone; llmcompress inspect small", tmp_path)
    assert done.returncode == 4
    assert done.stderr == "[4] the working folder was removed; change into one that exists\n"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a link to it of a name that is not UTF-8, and a recipe."""
    folder = tmp_path_factory.mktemp("names")
    save_tiny("llama", folder / "dense")
    (folder / "latin-\udce9").symlink_to("dense")
    (folder / "RECIPE").write_text(RECIPE)
    return folder


def test_no_text_of_a_file_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """An escape may set the clipboard, or write over the lines above."""
    hostile = "a\x1b]52;c;eA==\x07\x9b2K\r"
    told = hostile.encode("unicode_escape").decode()
    with pytest.raises(typer.Exit), Terminal() as terminal:
        terminal.show({}, lambda values, every: [hostile, build_table((f"h{hostile}",), [(f"c{hostile}",)])])
        terminal.say(f"s{hostile}")
        terminal.warn([f"w{hostile}"])
        raise InputError(f"e{hostile}\n[0] all is well")
    output, errors = capsys.readouterr()
    assert output.split() == [told, f"h{told}", f"c{told}", f"s{told}"]
    assert errors == f"warning: w{told}\n[{InputError.exit_code}] e{told}\\n[0] all is well\n"


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"llmcompress {__version__}\n")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", LONG, "RECIPE"], 5),
        (["plan", f"{LONG}/x", "RECIPE"], 5),
        (["plan", "~nouser/model", "RECIPE"], 5),
        (["plan", "a\0b", "RECIPE"], 5),
        (["plan", "\udcff", "RECIPE"], 5),
        (["plan", "dense", LONG], 2),
        (["plan", "dense", f"{LONG}.yaml"], 2),
        (["plan", "dense", "~nouser/recipe.yaml"], 2),
        (["plan", "dense", "\udcff.yaml"], 2),
        (["plan", "dense", "a\0b"], 2),
        (["compress", "dense", "RECIPE", "-o", LONG], 4),
        (["compress", "dense", "RECIPE", "-o", "x" * 245], 4),
        (["compress", "dense", "RECIPE", "-o", f"{LONG}/out"], 4),
        (["compress", "dense", "RECIPE", "-o", "\udcff"], 4),
        (["compress", "dense", "RECIPE", "-o", "."], 4),
        (["compress", "dense", "RECIPE", "-o", ""], 4),
        (["compress", "dense", "RECIPE", "-o", "/"], 4),
        (["compress", "dense", "RECIPE", "-o", ".."], 4),
        (["compress", "dense", "--for", "vllm", "-o", "."], 4),
        (["frontier", "dense", "--bpw", "3", "-o", ""], 4),
        (["drop", "dense", "--blocks", "1", "-o", ""], 4),
        (["narrow", "dense", "--neurons", "0.5", "-o", "."], 4),
        (["answer", "dense", "prompts.jsonl", "-o", ""], 4),
        (["report", "dense", "-o", ""], 4),
        (["plan", "latin-\udce9", "RECIPE"], 5),
        (["verify", "latin-\udce9"], 5),
        (["export", "latin-\udce9", "--to", "dense", "-o", "out"], 5),
        (["drop", "dense", "--count", "1", "-o", LONG], 4),
        (["eval", "dense", "--text", LONG], 5),
        (["eval", "dense", "--text", "~nouser/a.txt"], 5),
        (["compare", "dense", "dense", "-o", f"{LONG}.md"], 4),
        (["answer", "dense", "~nouser/prompts.jsonl", "-o", "answers.jsonl"], 5),
        (["answer", "dense", "prompts.jsonl", "-o", f"{LONG}.jsonl"], 4),
        (["answer", "dense", "prompts.jsonl", "-o", "none/answers.jsonl"], 4),
        (["verify", LONG], 5),
        (["inspect", LONG], 5),
        (["report", "dense", "-o", f"{LONG}.html"], 4),
        (["export", LONG, "--to", "dense", "-o", "out"], 5),
    ],
)
def test_a_name_that_no_file_can_have_is_a_sentence(
    words: list[str], code: int, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dense)
    done = CliRunner().invoke(app, words)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.exit_code == code, done.stderr
    assert isinstance(done.exception, SystemExit) and lines[-1].startswith(f"[{code}] ")
    assert {path.name for path in dense.iterdir()} == {"dense", "latin-\udce9", "RECIPE"}


def test_a_home_folder_that_no_shell_expanded_is_meant(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `~` in `--output-dir=~/out` and in quotes as it is."""
    monkeypatch.chdir(dense)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["drop", "dense", "--blocks", "1", "--output-dir=~/out"])
    assert done.exit_code == 0 and (tmp_path / "out" / "config.json").is_file() and not (dense / "~").exists()
    with pytest.raises(DiskError, match="^~/more begins with ~"):
        lc.drop_blocks("dense", [1], "~/more")
    assert not (dense / "~").exists()


def test_plan_warns_of_groups_that_do_not_divide_a_width(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dense)  # a model of widths 32 and 48
    said = CliRunner().invoke(app, ["plan", "dense", "RECIPE"]).stderr
    assert "group_size 24 does not divide its width 32, so the last of its groups has 8" in said
    assert "16 divides it" in said and "down_proj" not in said
    said = CliRunner().invoke(app, ["plan", "dense", "RECIPE", "--set", "rules[0].steps[0].group_size=40"]).stderr
    assert "does not divide its width 32, so a row is one group" in said and "does not divide its width 48" in said
    said = CliRunner().invoke(app, ["plan", "dense", "RECIPE", "--set", "rules[0].steps[0].group_size=16"]).stderr
    assert "does not divide" not in said


@pytest.mark.parametrize(("processes", "aborts"), [("1", True), ("2", False)])
def test_a_launched_process_does_not_abort_at_the_interpreters_end(
    processes: str, aborts: bool, tmp_path: Path
) -> None:
    """A module whose end aborts stands for a thread of another library that does."""
    program = (
        "import atexit, os, sys; from llmcompress.cli.process import end_process\n"
        "class Last:\n"
        "    def __del__(self, abort=os.abort): abort()\n"
        "sys.modules['last'] = Last()\n"
        "atexit.register(print, 'cleaned', file=sys.stderr)\n"
        "end_process(3)"
    )
    done = shell(f'"{sys.executable}" -c "{program}"', tmp_path, WORLD_SIZE=processes)
    assert "cleaned" in done.stderr and (done.returncode == 3) != aborts
