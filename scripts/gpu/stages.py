"""The stages of `scripts/gpu_check`: what each shows, and how long it may take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module

import torch

from scripts.gpu.given import Given

MOST = 25 * 60  # seconds of all stages together


@dataclass(frozen=True)
class Stage:
    """A part of the check, in its own process.

    `place`: the module of scripts/gpu and the function that does it. The function takes the stage's `Given`, or in
    `loan_parts` a `Loan`; it returns nothing, and raises an error if something is wrong.
    """

    name: str
    shows: str
    seconds: int
    place: str

    def run(self, given: Given) -> None:
        """Run the stage."""
        if given.device == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        module, _, function = self.place.partition(":")
        find = getattr(import_module(f"scripts.gpu.{module}"), function)
        if module == "loan_parts":
            from scripts.gpu.loan import Loan

            find(Loan(given.findings, torch.device(given.device), given.small, {}, given.work))
        else:
            find(given)


STAGES = (
    Stage("search", "the trellis search gives the codes of that on the CPU; its time", 90, "loan_parts:search"),
    Stage("kernels", "products with packed weights, and their times beside dense bfloat16", 240, "kernels:kernels"),
    Stage("devices", "every method, loss and command gives what it gives on the CPU", 270, "agreement:devices"),
    Stage("recipe", "compressing by a recipe: time, memory, KL beside the CPU's", 240, "compression:recipe"),
    Stage("bpw", "compressing to a size: time, memory, KL beside the CPU's", 180, "compression:bpw"),
    Stage("billion", "the same for a few blocks in the shape of a billion weights", 120, "compression:billion"),
    Stage("distil", "what is recovered, beside the targets of its results", 180, "distillation:distil"),
    Stage("generate", "a pass and a token, dense and compressed", 120, "loan_parts:generation"),
    Stage("memory", "peak memory follows one block, not the depth of a model", 60, "compression:memory"),
)  # fmt: skip
