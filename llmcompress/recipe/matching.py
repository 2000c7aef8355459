"""Match a recipe's rules to a model's linears: the steps of each, and the patterns that match nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

from llmcompress.methods.layer import StepConfig, sketch
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.patterns import REGEX, matches
from llmcompress.weight.expression import bits

NEAREST = 20  # patterns without a layer that are told the nearest name; to look for it takes long


class Ruled(Protocol):
    """A linear as rules see it."""

    @property
    def name(self) -> str:
        """Its module path."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its shape `(out, in)`."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Its roles in its block, as rules name them."""


@dataclass(frozen=True)
class Assignment:
    """A recipe laid over a model's linears.

    `steps`: of every linear, empty where it stays dense. `unmatched`: the patterns that no linear matches. `unruled`:
    linears that no rule speaks about. `shadowed`: patterns whose linears all belong to earlier rules. `notes`: about
    roles that the model lacks, and linears that have several.
    """

    steps: dict[str, tuple[StepConfig, ...]]
    unmatched: tuple[str, ...]
    unruled: tuple[str, ...]
    shadowed: tuple[str, ...]
    complaints: tuple[str, ...]  # a sentence for each unmatched pattern
    notes: tuple[str, ...] = ()

    def complaint(self) -> str:
        """Return the sentence about the first pattern that matches nothing."""
        return self.complaints[0]


def assign(recipe: Recipe, linears: Sequence[Ruled], others: Sequence[str] = ()) -> Assignment:
    """Return the steps for each linear: those of the first rule that covers it.

    A fused linear gets the most careful steps of its parts: those that store most bits. Parts without a rule do not
    count. `others` are modules that are never compressed, such as the head: a rule without steps may name them.
    """
    rules, names = recipe.rules, [linear.name for linear in linears]
    by_pattern = [[[name for name in names if matches(pattern, name)] for pattern in rule.match] for rule in rules]
    by_name = [{name for covered in each for name in covered} for each in by_pattern]
    chosen, merged = dict[str, int](), list[str]()
    for linear in linears:
        ruled = [number for number, rule in enumerate(rules) if rule.role or linear.name in by_name[number]]
        parts = {
            role: next((number for number in ruled if not rules[number].role or role in rules[number].role), None)
            for role in linear.roles or (None,)
        }
        numbers = sorted({number for number in parts.values() if number is not None})
        if len(numbers) > 1:
            numbers.sort(key=lambda number: -bits(sketch(linear.name, linear.shape, rules[number].steps)))
            careful = [role for role, number in parts.items() if number == numbers[0]]
            merged.append(f"{linear.name} is {_joined(linear.roles)} in one; it has the steps of {_joined(careful)}")
        if numbers:
            chosen[linear.name] = numbers[0]
    roles = {role for linear in linears for role in linear.roles}
    absent = [
        f"{recipe.at(('rules', number, 'role'))}rule {number + 1} leaves out {_joined(lacking)}: the model has no such "
        f"linear"
        for number, rule in enumerate(rules)
        if (lacking := [role for role in rule.role if role not in roles])
    ]
    unmatched, shadowed, complaints = _patterns(recipe, names, by_pattern, chosen, others)
    return Assignment(
        {name: rules[chosen[name]].steps if name in chosen else () for name in names},
        unmatched,
        tuple(name for name in names if name not in chosen),
        shadowed,
        complaints,
        (*absent, *merged),
    )


def _joined(names: Sequence[str | None]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def _patterns(
    recipe: Recipe,
    names: Sequence[str],
    by_pattern: Sequence[Sequence[list[str]]],
    chosen: Mapping[str, int],
    others: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the patterns that match nothing, those of which earlier rules have all, and a complaint for each of the
    first."""
    unmatched: list[str] = []
    shadowed: list[str] = []
    complaints: list[str] = []
    for number, rule in enumerate(recipe.rules):
        for index, (pattern, covered) in enumerate(zip(rule.match, by_pattern[number], strict=True)):
            elsewhere = [name for name in others if matches(pattern, name)]
            if not covered and (rule.steps or not elsewhere):
                unmatched.append(pattern)
                where = recipe.at(("rules", number, "match", index))
                near = names if len(complaints) < NEAREST else []
                complaints.append(f"{where}rule {number + 1} {_nothing(pattern, near, elsewhere, bool(names))}")
            elif covered and all(chosen[name] < number for name in covered):
                shadowed.append(pattern)
    return tuple(unmatched), tuple(shadowed), tuple(complaints)


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
