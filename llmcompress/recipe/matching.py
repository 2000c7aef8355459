"""Match a recipe's rules to a model's linears: the steps of each, and the patterns that match nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from llmcompress.methods.layer import StepConfig
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.patterns import REGEX, matches

NEAREST = 20  # patterns without a layer that are told the nearest name; to look for it takes long


@dataclass(frozen=True)
class Assignment:
    """A recipe laid over a model's linears.

    `steps`: of every linear, empty where it stays dense. `unmatched`: the patterns that no linear matches. `unruled`:
    linears that no rule speaks about. `shadowed`: patterns whose linears all belong to earlier rules.
    """

    steps: dict[str, tuple[StepConfig, ...]]
    unmatched: tuple[str, ...]
    unruled: tuple[str, ...]
    shadowed: tuple[str, ...]
    complaints: tuple[str, ...]  # a sentence for each unmatched pattern

    def complaint(self) -> str:
        """Return the sentence about the first pattern that matches nothing."""
        return self.complaints[0]


def assign(recipe: Recipe, names: Iterable[str], others: Sequence[str] = ()) -> Assignment:
    """Return the steps for each linear in `names` (module paths): those of the first rule that matches.

    `others` are modules that are never compressed, such as the head: a rule without steps may name them.
    """
    names = list(names)
    steps: dict[str, tuple[StepConfig, ...]] = {}
    unmatched: list[str] = []
    shadowed: list[str] = []
    complaints: list[str] = []
    for number, rule in enumerate(recipe.rules):
        before = set(steps)
        for index, pattern in enumerate(rule.match):
            found = [name for name in names if matches(pattern, name)]
            steps.update({name: rule.steps for name in found if name not in steps})
            elsewhere = [name for name in others if matches(pattern, name)]
            if not found and (rule.steps or not elsewhere):
                unmatched.append(pattern)
                where = recipe.at(("rules", number, "match", index))
                near = names if len(complaints) < NEAREST else []
                complaints.append(f"{where}rule {number + 1} {_nothing(pattern, near, elsewhere, bool(names))}")
            elif found and before.issuperset(found):
                shadowed.append(pattern)
    unruled = tuple(name for name in names if name not in steps)
    return Assignment(
        {name: steps.get(name, ()) for name in names}, tuple(unmatched), unruled, tuple(shadowed), tuple(complaints)
    )


def _nothing(pattern: str, near: Sequence[str], elsewhere: Sequence[str], some: bool) -> str:
    if elsewhere:
        return (
            f'has steps for {elsewhere[0]} ("{pattern}"), which is in no block; give them as embeddings: or head: if '
            f"it is that, else drop the rule"
        )
    if not some:
        return f'matches no layer ("{pattern}"): the model has none that can be compressed'
    if not near:
        return f'matches no layer of the model ("{pattern}")'
    bare = pattern.removeprefix(REGEX)
    nearest = max(near, key=lambda name: SequenceMatcher(None, bare, name, autojunk=False).ratio())
    return f'matches no layer of the model ("{pattern}"); the nearest name is {nearest}'
