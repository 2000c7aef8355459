"""The order of the house: what may import what, and what a file may be called."""

from __future__ import annotations

from graphlib import TopologicalSorter

import pytest

from tests.rules.source_tree import MODULES, ROOT, Module, repository_files

# From the foundation up to the command line; a room may import only rooms before it.
ROOMS = (
    "errors",
    "devices",  # where to compute
    "allocator",  # what becomes of freed memory
    "packing",  # codes <-> bytes
    "rotation",  # the random input basis
    "trellis",  # numbers of a bit-shift trellis
    "viterbi",  # the codes nearest to given numbers
    "viterbi_triton",  # the same on a GPU
    "weight",  # what a compressed weight is
    "encoding",  # its disk form
    "lookup",  # rows of a packed weight
    "attention",  # causal attention, fast in bfloat16
    "products",  # in which dtype, by which library
    "moments",  # additive calibration statistics
    "layer",  # Layer, @method
    "runs",  # long matrices, a run of rows at a time
    "methods",  # Layer -> Layer
    "architecture",  # model families as data
    "states",  # hidden states between blocks
    "locate",  # where a model is
    "validation",  # is a checkpoint whole?
    "source",  # a dense model on disk
    "text",  # where text comes from
    "teacher",  # text the model writes itself
    "tokens",  # text -> calibration sequences
    "modules",  # CompressedLinear
    "estimators",  # gradients through rounding
    "masters",  # where what trains starts
    "latents",  # what latent codes are made of
    "live",  # how a weight that trains is multiplied
    "relax",  # a compressed weight that trains
    "blocks",  # one decoder block at a time
    "importance",  # what each calibration token counts
    "calibrate",  # the walk
    "strict_yaml",  # YAML as recipes use it
    "complaints",  # what is wrong with a recipe, in words
    "target",  # a size or a quality to aim at
    "fuse",  # changes to a dense model that leave its outputs as they are
    "recipe",  # what the user asked for
    "assignment",  # a recipe over a model's linears
    "planning",  # what a run would do, from headers alone
    "checkpoint",  # disk
    "hf",  # the transformers plug-in
    "merges",  # what PEFT must know of compressed weights
    "plugin",  # when to load these two
    "adapters",  # LoRA adapters as low-rank terms
    "protocol",  # how models are scored
    "evaluate",
    "report",
    "journal",  # finished blocks, for a run that was cut
    "learning",  # blocks that learn meanwhile
    "compression",  # what becomes of one block
    "driver",  # model + recipe -> checkpoint + report
    "allocate",  # a size or a quality -> steps for every layer
    "surgery",  # edits of a dense model's structure
    "scoring",  # a model by its name, scored
    "verify",  # is a checkpoint what was written, and does it run?
    "export",  # doors out
    "plots",  # a report as a picture
    "distill",  # the teacher teaches the student
    "recover",  # compress, then distil
    "terminal",  # how a command speaks and ends
    "tables",  # plans, reports and scores for people
    "comparison",  # several models in one table
    "frontier",  # one model at many sizes
    "card",  # a report as the Hub shows it
    "hub",  # publishing
    "options",  # what commands share
    "delivery",  # commands that check and hand on
    "sweeping",  # the command for many sizes
    "cli",
    "__main__",
)
# A method shares code with others through the files of methods/ that register none. The exceptions:
SIBLINGS = {
    "llmcompress.methods.gptq": {"llmcompress.methods.rtn"},  # rtn with feedback
    "llmcompress.methods.hqq": {"llmcompress.methods.rtn"},  # rtn whose grids are solved for again
}
NOUNS_MISSING = {"utils", "util", "common", "base", "manager", "helpers", "misc"}

ROOM_MODULES = [module for module in MODULES if module.room]
METHODS = {module.name for module in MODULES if "\n@method(" in module.text}


@pytest.mark.parametrize("module", ROOM_MODULES, ids=str)
def test_every_file_has_a_room(module: Module) -> None:
    assert module.room in ROOMS, f"{module} is in no room; put it in one, or add its room to ROOMS where it belongs"


@pytest.mark.parametrize("module", ROOM_MODULES, ids=str)
def test_imports_point_upward(module: Module) -> None:
    above = ROOMS[: ROOMS.index(module.room) + 1] if module.room in ROOMS else ROOMS
    rooms = {name: (name.split(".") + [""])[1] for name in module.local_imports()}
    low = sorted(name for name, room in rooms.items() if room not in above)
    assert not low, f"{module} imports {low}; a room may import only rooms above it. Move the shared part up."


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module.name: module.local_imports() - {module.name} for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if module.room == "methods"], ids=str)
def test_methods_do_not_import_methods(module: Module) -> None:
    if module.name == "llmcompress.methods":
        return
    others = module.local_imports() & METHODS - {module.name} - SIBLINGS.get(module.name, set())
    assert not others, f"{module} imports the methods {sorted(others)}; move the shared part to a file without @method"


def test_every_method_is_registered() -> None:
    [index] = [module for module in MODULES if module.name == "llmcompress.methods"]
    absent = METHODS - index.local_imports()
    assert not absent, f"methods/__init__.py does not import {sorted(absent)}"


def test_no_file_is_named_after_nothing() -> None:
    named = [str(path.relative_to(ROOT)) for path in repository_files() if path.stem in NOUNS_MISSING]
    assert not named, f"{named}: a function without a room shows a missing noun; name the file after what it holds"
