"""The stages of `scripts/gpu_check`: what each shows, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from scripts.gpu.given import Given

MOST = 25 * 60  # seconds of all stages together


@dataclass(frozen=True)
class Stage:
    """A part of the check, in a process of its own. `place`: the module of scripts/gpu and the function that does it;
    it returns nothing, and ends with SystemExit and a sentence where something is wrong."""

    name: str
    shows: str
    seconds: int
    place: str

    def run(self, given: Given) -> None:
        """Do what the stage is for."""
        module, _, function = self.place.partition(":")
        getattr(import_module(f"scripts.gpu.{module}"), function)(given)


STAGES = (
    Stage("search", "the trellis search gives the codes of that on the CPU; its time", 60, "agreement:search"),
    Stage("kernels", "products with packed weights, and their times beside dense bfloat16", 270, "kernels:kernels"),
    Stage("devices", "every method, loss and command gives what it gives on the CPU", 270, "agreement:devices"),
    Stage("recipe", "compressing by a recipe: time, memory, KL beside the CPU's", 240, "compression:recipe"),
    Stage("bpw", "compressing to a size: time, memory, KL beside the CPU's", 180, "compression:bpw"),
    Stage("billion", "the same for a few blocks in the shape of a billion weights", 120, "compression:billion"),
    Stage("distil", "what is recovered, beside the targets of its results", 180, "distillation:distil"),
    Stage("generate", "tokens a second, dense and compressed", 90, "generation:generation"),
    Stage("memory", "peak memory follows one block, not the depth of a model", 60, "compression:memory"),
)  # fmt: skip
