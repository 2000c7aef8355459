"""Lay a recipe's rules over a model's linear layers: the steps of each, and the patterns that match nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Protocol

from llmcompress.methods.layer import StepConfig, sketch
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.rules import REGEX, InputRounding, is_name, matches
from llmcompress.weight.expression import bits

MOST_HINTS = 20  # patterns without a layer that get the nearest name, which takes long to find


class LinearLayer(Protocol):
    """A linear layer as rules see it."""

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
    """A recipe laid over the linear layers of a model."""

    steps: dict[str, tuple[StepConfig, ...]]  # by layer; empty where it stays dense
    unmatched: tuple[str, ...]  # patterns that match no layer
    unruled: tuple[str, ...]  # layers that no rule covers
    shadowed: tuple[str, ...]  # patterns whose layers all belong to earlier rules
    complaints: tuple[str, ...]  # a sentence for each unmatched pattern
    inputs: dict[str, InputRounding] = field(default_factory=dict)  # by layer, where they are rounded
    notes: tuple[str, ...] = ()  # on roles that the model does not have, and on layers that have several

    def complaint(self) -> str:
        """Return the sentence on the first pattern that matches nothing."""
        return self.complaints[0]


def assign(recipe: Recipe, linears: Sequence[LinearLayer], others: Sequence[str] = ()) -> Assignment:
    """Return the steps of each layer: those of the first rule that covers it.

    A fused layer gets the steps of the part for which they store most bits; parts without a rule do not count.
    `others` are modules that are never compressed, such as the head: a rule without steps may name them.
    """
    rules, names = recipe.rules, [linear.name for linear in linears]
    known = dict.fromkeys(names)
    by_pattern = [[_covered_names(pattern, known) for pattern in rule.match] for rule in rules]
    by_name = [{name for covered in each for name in covered} for each in by_pattern]
    chosen, fused = dict[str, int](), list[str]()
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
            fused.append(f"{linear.name} is {_join(linear.roles)} in one; it has the steps of {_join(careful)}")
        if numbers:
            chosen[linear.name] = numbers[0]
    roles = {role for linear in linears for role in linear.roles}
    absent = [
        f"{recipe.at(('rules', number, 'role'))}rule {number + 1} leaves out {_join(lacking)}: the model has no such "
        f"linear"
        for number, rule in enumerate(rules)
        if (lacking := [role for role in rule.role if role not in roles])
    ]
    unmatched, complaints = _unmatched_patterns(recipe, names, by_pattern, others)
    shadowed = [
        pattern
        for number, rule in enumerate(rules)
        for pattern, covered in zip(rule.match, by_pattern[number], strict=True)
        if covered and all(chosen[name] < number for name in covered)
    ]
    return Assignment(
        {name: rules[chosen[name]].steps if name in chosen else () for name in names},
        tuple(unmatched),
        tuple(name for name in names if name not in chosen),
        tuple(shadowed),
        tuple(complaints),
        {name: asked for name in names if name in chosen and (asked := rules[chosen[name]].inputs) is not None},
        (*absent, *fused),
    )


def _covered_names(pattern: str, names: Mapping[str, object]) -> list[str]:
    """Return the names that a pattern matches. One that is a name is looked up: a rule may name thousands."""
    if is_name(pattern):
        return [pattern] if pattern in names else []
    return [name for name in names if matches(pattern, name)]


def _join(names: Sequence[str | None]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def _unmatched_patterns(
    recipe: Recipe, names: Sequence[str], by_pattern: Sequence[Sequence[list[str]]], others: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the patterns that match nothing, and a complaint for each."""
    outside = dict.fromkeys(others)
    unmatched: list[str] = []
    complaints: list[str] = []
    for number, rule in enumerate(recipe.rules):
        for index, (pattern, covered) in enumerate(zip(rule.match, by_pattern[number], strict=True)):
            elsewhere = [] if covered else _covered_names(pattern, outside)
            if not covered and (rule.steps or not elsewhere):
                unmatched.append(pattern)
                where = recipe.at(("rules", number, "match", index))
                near = names if len(complaints) < MOST_HINTS else []
                complaints.append(f"{where}rule {number + 1} {_complain(pattern, near, elsewhere, bool(names))}")
    return unmatched, complaints


def _complain(pattern: str, near: Sequence[str], elsewhere: Sequence[str], has_layers: bool) -> str:
    """Return what is wrong with a pattern that matches no layer; `near` are names to suggest one from."""
    if elsewhere:
        return (
            f'has steps for {elsewhere[0]} ("{pattern}"), which is in no block; give them as embeddings: or head: if '
            f"it is that, else drop the rule"
        )
    if not has_layers:
        return f'matches no layer ("{pattern}"): the model has none that can be compressed'
    if not near:
        return f'matches no layer of the model ("{pattern}")'
    bare = pattern.removeprefix(REGEX)
    nearest = max(near, key=lambda name: SequenceMatcher(None, bare, name, autojunk=False).ratio())
    return f'matches no layer of the model ("{pattern}"); the nearest name is {nearest}'
