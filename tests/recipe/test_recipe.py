"""Recipes: what they mean, that they survive a round trip, and the sentence for everything that can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import methods, step
from llmcompress.models.dense import families as roles_room
from llmcompress.models.dense.families import Linear
from llmcompress.recipe import matching
from llmcompress.recipe import rules as recipe_rules
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.matching import assign
from llmcompress.recipe.read import Change, apply_settings, dump, parse_recipe, read_recipe
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.recipe.rules import Role, Rule, matches
from llmcompress.recipe.sections import Gates
from llmcompress.recipe.target import Target
from llmcompress.recipe.yaml import parse

EXAMPLES = [{"method": name, **example} for name, method in methods().items() for example in method.config.examples]
NAMES = [
    f"model.layers.{block}.{linear}"
    for block in range(3)
    for linear in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
LINEARS = [Linear(name, (32, 32)) for name in NAMES]
RECIPE = """\
version: 1
name: pb
calibration: {samples: 4, length: 32}
rules:
  - match: ['*.v_proj', '*.down_proj']
    steps:
      - {method: pb_llm, salient: 0.15}
      - {method: eora, rank: 2}
  - match: '*'
    steps: []
"""


def rules(steps: str) -> str:
    """A recipe with these steps for everything, which stand in line 4."""
    return f"version: 1\nrules:\n  - match: '*'\n    steps: [{steps}]\n"


def with_line(line: str) -> str:
    """A recipe whose line 2 is `line`."""
    return f"version: 1\n{line}\nrules: [{{match: '*', steps: []}}]\n"


# --- what recipes mean ------------------------------------------------------------------------------------------


def test_yaml_and_python_build_the_same_recipe() -> None:
    built = Recipe(
        name="pb",
        calibration=Calibration(samples=4, length=32),
        rules=(
            Rule(
                match=("*.v_proj", "*.down_proj"),
                steps=(step({"method": "pb_llm", "salient": 0.15}), step({"method": "eora", "rank": 2})),
            ),
            Rule.model_validate({"match": "*", "steps": []}),
        ),
    )
    assert parse_recipe(RECIPE) == built
    assert read_recipe(built) is built


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_dump_reads_back_equal(example: dict[str, Any]) -> None:
    recipe = read_recipe({"version": 1, "rules": [{"match": ["re:.*\\.(q|k)_proj", "2:4"], "steps": [example]}]})
    again = parse_recipe(dump(recipe))
    assert again == recipe
    assert type(again.rules[0].steps[0]) is type(recipe.rules[0].steps[0])
    assert dump(again) == dump(recipe)


def test_dump_reads_back_equal_with_everything_set() -> None:
    recipe = Recipe(
        name="1e-4",
        seed=3,
        calibration=Calibration(dataset="text.txt", bos=False, held_out=0.5),
        asymmetric=1e-5,
        cap=None,
        rules=(Rule(match=("no",), steps=()),),
        gates=Gates(max_fallback_layers=0.5),
    )
    assert parse_recipe(dump(recipe)) == recipe
    assert Recipe.model_validate(yaml.safe_load(dump(recipe))) == recipe  # other readers of YAML agree


def test_recipes_are_frozen_and_hashable_values() -> None:
    recipe = parse_recipe(RECIPE)
    assert recipe == parse_recipe("# a comment moves every line\n" + RECIPE)
    assert recipe.model_copy(update={"seed": 1}) != recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_a_recipe_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    file = tmp_path / "pruned-half.yaml"
    file.write_text("version: 1\nrules: [{match: '*', steps: [{method: wanda, sparsity: 5e-1}]}]\n")
    recipe = read_recipe(file)
    assert recipe.name == "pruned-half"
    assert recipe.rules[0].steps[0].model_dump()["sparsity"] == 0.5  # YAML 1.1 takes 5e-1 for text


def test_anchors_save_repetition() -> None:
    recipe = parse_recipe(
        "version: 1\nrules:\n- {match: a, steps: &s [{method: rtn}]}\n- {match: b, steps: *s}\n",
    )
    assert recipe.rules[0].steps == recipe.rules[1].steps


# --- which layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.mlp.down_proj", "model.layers.10.mlp.down_proj", True),
        ("model.layers.*", "model.layers.10.mlp.down_proj", True),
        ("model.layers.1.*", "model.layers.10.mlp.down_proj", False),
        ("model.layers.[0-4].*", "model.layers.3.mlp.down_proj", True),
        ("down_proj", "model.layers.3.mlp.down_proj", False),
        ("*.DOWN_proj", "model.layers.3.mlp.down_proj", False),
        ("re:.*_proj", "model.layers.3.mlp.down_proj", True),
        ("re:down_proj", "model.layers.3.mlp.down_proj", False),
        (r"re:model\.layers\.(0|29)\..*", "model.layers.29.mlp.down_proj", True),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_first_rule_that_matches_wins() -> None:
    recipe = parse_recipe(
        "version: 1\nrules:\n"
        "- {match: '*.1.*', steps: [{method: rtn, bits: 8}]}\n"
        "- {match: '*.down_proj', steps: []}\n"
        "- {match: '*', steps: [{method: rtn, bits: 2}]}\n"
    )
    laid = assign(recipe, LINEARS)
    bits = {name: [s.model_dump()["bits"] for s in steps] for name, steps in laid.steps.items()}
    assert list(bits) == NAMES
    assert bits["model.layers.1.mlp.down_proj"] == [8]
    assert bits["model.layers.0.mlp.down_proj"] == []
    assert bits["model.layers.0.self_attn.q_proj"] == [2]
    assert (laid.unmatched, laid.unruled, laid.shadowed) == ((), (), ())


def test_what_no_rule_speaks_about_stays_dense_and_is_listed() -> None:
    laid = assign(parse_recipe(RECIPE.replace("  - match: '*'\n    steps: []\n", "")), LINEARS)
    dense = tuple(name for name in NAMES if name.endswith("q_proj"))
    assert laid.unruled == dense
    assert all(laid.steps[name] == () for name in dense)


def test_patterns_that_match_nothing_are_listed_with_the_nearest_name() -> None:
    text = RECIPE.replace("'*.v_proj', ", "'*.v_proj',\n            '*.mlp.dwn_proj', ")
    laid = assign(parse_recipe(text, "pb.yaml"), LINEARS)
    assert laid.unmatched == ("*.mlp.dwn_proj",)
    assert laid.complaint() == (
        'pb.yaml:6: rule 1 matches no layer of the model ("*.mlp.dwn_proj"); '
        "the nearest name is model.layers.0.mlp.down_proj"
    )


def test_patterns_that_are_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target's recipe names each matrix of a mixture: trying each on each would take minutes."""
    names = [f"layers.{number // 7}.linear{number % 7}" for number in range(3000)]
    grids = [[{"method": "rtn", "bits": bits}] for bits in (4, 2)]

    def lay(count: int, *also: Any) -> Any:
        given = [{"match": names[:count:2], "steps": grids[0]}, {"match": names[:count], "steps": grids[1]}, *also]
        recipe = read_recipe({"version": 1, "rules": given})
        return assign(recipe, [Linear(name, (32, 32)) for name in names[: count + 1]], others=["head", "layers"])

    more = {"match": ["*.linear0", names[8], "head", "layers.1"], "steps": []}, {"match": "absent", "steps": grids[0]}
    looked_up = lay(20, *more)
    with monkeypatch.context() as patch:
        patch.setattr(matching, "is_name", lambda pattern: False)
        assert lay(20, *more) == looked_up
    assert looked_up.shadowed == (*names[:20:2], "*.linear0", names[8]) and looked_up.unruled == (names[20],)
    assert looked_up.unmatched == ("layers.1", "absent")
    monkeypatch.setattr(recipe_rules, "fnmatchcase", None)
    large = lay(2999)
    assert large.unruled == (names[2999],) and large.shadowed == tuple(names[:2999:2])


def test_rules_that_come_too_late_are_listed() -> None:
    laid = assign(parse_recipe(rules("{method: rtn}") + "  - {match: '*.down_proj', steps: []}\n"), LINEARS)
    assert laid.shadowed == ("*.down_proj",)


def test_modules_that_are_never_compressed_may_be_named_only_to_leave_them() -> None:
    recipe = parse_recipe("version: 1\nrules:\n- {match: lm_head, steps: []}\n- {match: '*', steps: []}\n")
    assert assign(recipe, LINEARS, others=["lm_head"]).unmatched == ()
    recipe = parse_recipe("version: 1\nrules:\n- {match: lm_head, steps: [{method: rtn}]}\n")
    assert assign(recipe, LINEARS, others=["lm_head"]).complaint() == (
        'recipe.yaml:3: rule 1 has steps for lm_head ("lm_head"), which is in no block; '
        "give them as embeddings: or head: if it is that, else drop the rule"
    )


ROLES = """\
version: 1
rules:
  - {role: value, steps: [{method: rtn, bits: 4}]}
  - {role: [key, down], steps: [{method: rtn, bits: 3}]}
  - {role: query, steps: [{method: rtn, bits: 2}]}
  - {match: '*', steps: [{method: rtn, bits: 1}]}
"""


def bits_by_leaf(text: str, *names: str) -> dict[str, list[int]]:
    """Return the bits that a recipe of grids gives to linears of `names`."""
    laid = assign(parse_recipe(text), [Linear(name, (32, 32)) for name in names])
    return {name: [step.model_dump()["bits"] for step in steps] for name, steps in laid.steps.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("h.0.attn.q_proj", "h.0.attn.k_proj", "h.0.attn.v_proj", "h.0.mlp.down_proj", "h.0.mlp.up_proj"),
        ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "0.fc2", "0.fc1"),
        ("0.attention.self.query", "0.attention.self.key", "0.attention.self.value", "0.output.dense", "0.fc1"),
    ],
)
def test_roles_are_what_linears_do_whatever_they_are_called(names: tuple[str, ...]) -> None:
    assert list(bits_by_leaf(ROLES, *names).values()) == [[2], [3], [4], [3], [1]]


def test_rules_name_the_roles_that_linears_have() -> None:
    assert {role for roles in roles_room._PLACES for role in roles} == set(get_args(Role))


def test_a_fused_linear_has_the_most_careful_steps_of_its_parts() -> None:
    given = bits_by_leaf(ROLES, "0.self_attn.qkv_proj", "0.attn.c_attn", "0.self_attn.kv_b_proj", "0.mlp.gate_up_proj")
    assert list(given.values()) == [[4], [4], [4], [1]]
    kept = ROLES.replace("{role: query, steps: [{method: rtn, bits: 2}]}", "{role: query, steps: []}")
    assert bits_by_leaf(kept, "0.self_attn.qkv_proj") == {"0.self_attn.qkv_proj": []}
    laid = assign(parse_recipe(ROLES), [Linear("0.attn.c_attn", (96, 32)), Linear("0.mlp.c_proj", (32, 64))])
    assert laid.notes == ("0.attn.c_attn is query, key and value in one; it has the steps of value",)


def test_parts_without_a_rule_do_not_count() -> None:
    only = "version: 1\nrules:\n  - {role: key, steps: [{method: rtn, bits: 5}]}\n"
    laid = assign(parse_recipe(only), [Linear("0.attn.c_attn", (96, 32)), Linear("0.attn.c_proj", (32, 32))])
    assert [[step.model_dump()["bits"] for step in steps] for steps in laid.steps.values()] == [[5], []]
    assert laid.unruled == ("0.attn.c_proj",)


def test_a_role_that_a_model_lacks_is_left_out_with_a_line() -> None:
    laid = assign(parse_recipe(ROLES), [Linear("0.mixer.in_proj", (32, 32)), Linear("0.q_proj", (32, 32))])
    assert (laid.unmatched, laid.complaints) == ((), ())
    assert laid.notes == (
        "recipe.yaml:3: rule 1 leaves out value: the model has no such linear",
        "recipe.yaml:4: rule 2 leaves out key and down: the model has no such linear",
    )


def test_a_rule_by_role_survives_a_round_trip() -> None:
    recipe = parse_recipe(ROLES)
    assert parse_recipe(dump(recipe)) == recipe
    assert [set(rule) for rule in recipe.model_dump(mode="json")["rules"]] == [{"role", "steps"}] * 3 + [
        {"match", "steps"}
    ]


# --- overrides --------------------------------------------------------------------------------------------------


def test_settings_change_what_is_there_and_fill_in_what_the_schema_knows() -> None:
    recipe = read_recipe(
        parse_recipe(RECIPE),
        [
            "rules[0].steps[1].rank=16",
            "rules[0].match=['*.q_proj']",
            "seed=7",
            "gates.max_fallback_layers=0.5",
            "cap=null",
            "rules[0].steps[0].group_size = 64",
        ],
    )
    [salient, low_rank] = recipe.rules[0].steps
    assert low_rank.model_dump()["rank"] == 16
    assert salient.model_dump()["group_size"] == 64
    assert (recipe.seed, recipe.cap, recipe.rules[0].match) == (7, None, ("*.q_proj",))
    assert recipe.gates.max_fallback_layers == 0.5


def test_settings_leave_the_original_alone() -> None:
    values = {"version": 1, "rules": [{"match": "*", "steps": []}]}
    assert apply_settings(Recipe, values, ["calibration.samples=3"], {})["calibration"] == {"samples": 3}
    assert "calibration" not in values


SECTIONS = {
    "version": 1,
    "name": "both",
    "seed": 5,
    "calibration": {"held_out": 2},
    "rules": [{"match": "*", "steps": [{"method": "rtn"}]}],
    "reconstruct": {},
    "distill": {"name": "own", "losses": [{"of": {"loss": "forward_kl"}}]},
}


def test_sections_have_the_names_and_seeds_of_their_recipe_unless_they_give_their_own() -> None:
    recipe = read_recipe(SECTIONS)
    assert recipe.reconstruct == Reconstruction(name="both", seed=5)
    assert recipe.distill == Distillation(name="own", seed=5)
    assert parse_recipe(dump(recipe)) == recipe
    seeded = read_recipe(SECTIONS, ["distill.seed=1"], [Change("seed", 7, "--seed")])
    assert seeded.reconstruct is not None and seeded.distill is not None
    assert (seeded.seed, seeded.reconstruct.seed, seeded.distill.seed) == (7, 7, 1)


def test_changes_replace_values_and_name_their_option() -> None:
    learns = Change("reconstruct", {}, "--tune", keep=True)
    without = {key: value for key, value in SECTIONS.items() if key != "reconstruct"}
    assert read_recipe(without, changes=[learns]).reconstruct == Reconstruction(name="both", seed=5)
    assert read_recipe(SECTIONS | {"reconstruct": {"steps": 3}}, changes=[learns]).reconstruct != Reconstruction()
    aimed = {"version": 1, "calibration": {}}  # which alone is no recipe
    assert read_recipe(aimed, changes=[Change("target", {"bpw": 2.0}, "--bpw")]).target == Target(bpw=2.0)
    for key, value, origin, sentence in (
        ("seed", -1, "--seed", "--seed: seed is -1; it must be a whole number at least 0"),
        (
            "target",
            {"bpw": 20.0},
            "--bpw",
            "--bpw: target: bpw is 20.0; it must be a number more than 0",
        ),
        ("target", {"bytes": "40 megs"}, "--size", "--size: target: bytes: '40 megs' is no size"),
    ):
        with pytest.raises(RecipeError) as caught:
            read_recipe(aimed, changes=[Change(key, value, origin)])
        assert str(caught.value).startswith(sentence)


def test_settings_reach_into_sections() -> None:
    settings = [
        "distill.losses[0].of.temperature=2",
        "distill.losses[0].weight={from: 1.0, to: 0.5}",
        "distill.losses[0].weight.to=0.0",
        "distill.rates.codes=1e-3",
        "distill.teacher.kind=online",
        "reconstruct.rates.scales=2e-3",
    ]
    recipe = read_recipe(SECTIONS, settings)
    assert recipe.distill is not None and recipe.reconstruct is not None
    [term] = recipe.distill.losses
    assert term.of.model_dump()["temperature"] == 2 and term.weight_at(9, 9) == 0.0
    assert (recipe.distill.rates, recipe.reconstruct.rates) == ({"codes": 1e-3}, {"scales": 2e-3})
    wrong = "distill.losses[0].of.temprature=2"
    with pytest.raises(RecipeError, match='unknown key "temprature" in loss forward_kl; did you mean "temperature"'):
        read_recipe(SECTIONS, [wrong])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("sed=7", 'unknown key "sed" in the recipe; did you mean "seed"?'),
        ("rules[0].steps[0].grupsize=4", 'unknown key "grupsize" in step pb_llm; did you mean "group_size"?'),
        ("gates.max=4", 'unknown key "max" in gates; known: max_fallback_layers'),
        ("calibration.sample=4", 'unknown key "sample" in calibration; did you mean "samples"?'),
        ("rules[2].match=a", "rules has 2 entries, counted from 0; there is no [2]"),
        ("rules[0].steps[0].salient.x=4", "rules[0].steps[0].salient has no keys, so there is no"),
        ("name[0]=a", "name is not a list"),
        ("seed", "this is not of the form key=value, such as rules[0].steps[1].rank=16"),
        ("a..b=1", "this is not of the form key=value"),
        ("rules[x].match=1", "this is not of the form key=value"),
        ("seed=", "there is no value; write null for none"),
        ("seed=[1", "this is not YAML"),
        ("seed=a", 'seed is "a"; it must be a whole number at least 0'),
        ("rules[0].steps[1].rank=0", "step eora: rank is 0; it must be a whole number at least 1 or null"),
    ],
)
def test_settings_that_cannot_be_applied(setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, settings=[setting])
    assert str(caught.value).startswith(f"--set {setting}:")
    assert sentence in str(caught.value)


# --- everything that can be wrong -------------------------------------------------------------------------------

TWO_STEPS = "{method: alternate, base: {method: %s}, low_rank: {method: %s}}"
WRONG = [
    # versions
    ("rules: []", "recipe.yaml:1: the recipe has no version; write version: 1"),
    ("version: 2\nrules: []", "recipe.yaml:1: version is 2, and this llmcompress reads up to 1; upgrade it"),
    ("version: 0\nrules: []", "recipe.yaml:1: version is 0; it must be 1"),
    ("version: '1'\nrules: []", 'recipe.yaml:1: version is "1"; it must be 1'),
    # keys
    (with_line("ruls: 3"), 'recipe.yaml:2: unknown key "ruls" in the recipe; did you mean "rules"?'),
    (with_line("gates: {max_fallback: 1}"), 'recipe.yaml:2: unknown key "max_fallback" in gates; did you mean "max_'),
    (with_line("calibration: {sampels: 9}"), 'recipe.yaml:2: unknown key "sampels" in calibration; did you mean "sa'),
    (with_line("<<: {seed: 1}"), 'recipe.yaml:2: unknown key "<<" in the recipe; known: version, name, seed,'),
    ("version: 1\nseed: 2", 'recipe.yaml:1: the key "rules" is missing'),
    ("version: 1\nrules:\n- match: a\n- steps: []", "recipe.yaml:4: rule 2: give either match or role"),
    ("version: 1\nrules:\n- match: a", 'recipe.yaml:3: rule 1: the key "steps" is missing'),
    ("version: 1\nrules:\n- {match: a, stepz: []}", 'recipe.yaml:3: unknown key "stepz" in rule 1; did you mean "st'),
    (
        rules("\n  {method: pb_llm,\n  grupsize: 64}"),
        'recipe.yaml:6: unknown key "grupsize" in step pb_llm; did you mean "group_size"?',
    ),
    (rules("{method: rotate, seed: 1}"), 'recipe.yaml:4: unknown key "seed" in step rotate; known: method'),
    (
        rules(TWO_STEPS % ("gptq, bit: 2", "svd, rank: 1")),
        'recipe.yaml:4: unknown key "bit" in step gptq; did you mean "bits"?',
    ),
    # values
    (with_line("name: 5"), "recipe.yaml:2: name is 5; it must be text"),
    (with_line("name: ''"), 'recipe.yaml:2: name is ""; it must not be empty'),
    (with_line("name: 2026-01-01"), 'recipe.yaml:2: name is "2026-01-01"; it must be text'),
    (with_line("seed: -1"), "recipe.yaml:2: seed is -1; it must be a whole number at least 0 and less than"),
    (with_line("seed: yes"), "recipe.yaml:2: seed is true; it must be a whole number"),
    (with_line("seed: 1.5"), "recipe.yaml:2: seed is 1.5; it must be a whole number"),
    (with_line("cap: 0"), "recipe.yaml:2: cap is 0; it must be a number more than 0 or null"),
    (with_line("cap: .nan"), "recipe.yaml:2: cap is NaN; it must be a number more than 0 or null"),
    (with_line("prefix: dens"), 'recipe.yaml:2: prefix is "dens"; it must be "compressed" or "dense"'),
    (with_line("asymmetric: 2"), "recipe.yaml:2: asymmetric is 2; it must be a number at least 0 and at most 1"),
    (with_line("prefix: dense\nasymmetric: 1"), "recipe.yaml:1: asymmetric: with prefix: dense every layer sees dense"),
    (with_line("gates: 3"), "recipe.yaml:2: gates is 3; it must be a map of keys"),
    (with_line("calibration: wikitext"), 'recipe.yaml:2: calibration is "wikitext"; it must be a map of keys or null'),
    (with_line("calibration: {samples: 0}"), "recipe.yaml:2: calibration: samples is 0; it must be a whole number at"),
    (with_line("calibration: {bos: 3}"), 'recipe.yaml:2: calibration: bos is 3; it must be "auto" or true or false'),
    (with_line("calibration: {dataset: self, packing: no}"), "recipe.yaml:2: calibration: the text of dataset 'self'"),
    (with_line("calibration: {dataset: random}"), "recipe.yaml:2: calibration: nothing can be judged by random tokens"),
    ("version: 1\nrules: []", "recipe.yaml:2: rules is []; it must not be empty"),
    ("version: 1\nrules: 5", "recipe.yaml:2: rules is 5; it must be a list"),
    ("version: 1\nrules: [5]", "recipe.yaml:2: item 1 of rules is 5; it must be a map of keys"),
    ("version: 1\nrules: [{match: [], steps: []}]", "recipe.yaml:2: rule 1: match is []; it must not be empty"),
    ("version: 1\nrules: [{match: [a, 3], steps: []}]", "recipe.yaml:2: rule 1: item 2 of match is 3; it must be text"),
    ("version: 1\nrules: [{steps: []}]", "recipe.yaml:2: rule 1: give either match or role"),
    ("version: 1\nrules: [{match: '*', role: key, steps: []}]", "recipe.yaml:2: rule 1: give either match or role"),
    (
        "version: 1\nrules: [{role: keys, steps: []}]",
        'recipe.yaml:2: rule 1: role is "keys"; it must be a list of "query" or',
    ),
    ("version: 1\nrules: [{match: ' ', steps: []}]", "recipe.yaml:2: rule 1: match has the empty pattern ' '; write"),
    ("version: 1\nrules: [{match: 're:(', steps: []}]", "recipe.yaml:2: rule 1: match has 're:(', which is no regular"),
    ("version: 1\nrules: [{match: '*', steps: null}]", "recipe.yaml:2: rule 1: steps is null; it must be a list"),
    # steps
    (rules("gptq"), "recipe.yaml:4: rule 1: steps: a step is a map such as {method: rtn, bits: 4}"),
    (rules("{bits: 3}"), 'recipe.yaml:4: a step needs the key "method" with the name of a method'),
    (rules("{method: [rtn]}"), 'recipe.yaml:4: a step needs the key "method" with the name of a method'),
    (rules("{method: gtpq}"), "recipe.yaml:4: unknown method 'gtpq'; did you mean 'gptq'?"),
    (rules("{method: xyz}"), "recipe.yaml:4: unknown method 'xyz'; known: adadim, "),
    (rules("{method: gptq, bits: 9}"), "recipe.yaml:4: step gptq: bits is 9; it must lie in 1..8, or be 'ternary'"),
    (rules("{method: gptq, bits: 3.5}"), 'recipe.yaml:4: step gptq: bits is 3.5; it must be a whole number or "tern'),
    (
        rules("{method: gptq, damping: 20}"),
        "recipe.yaml:4: step gptq: damping is 20; it must be a number more than 0 a",
    ),
    (rules("{method: gptq, act_order: 3}"), "recipe.yaml:4: step gptq: act_order is 3; it must be true or false"),
    (rules("{method: gptq, group_size: 0}"), "recipe.yaml:4: step gptq: group_size is 0; it must be a whole number at"),
    (rules("{method: wanda}"), "recipe.yaml:4: step wanda: give either sparsity or pattern"),
    (
        rules("{method: wanda, sparsity: 1.5}"),
        "recipe.yaml:4: step wanda: sparsity is 1.5; it must be a number at leas",
    ),
    (
        rules("{method: wanda, pattern: 2:4}"),
        "recipe.yaml:4: step wanda: pattern is the number 124: YAML reads 2:4 as a time, write pattern: '2:4'",
    ),
    (rules("{method: wanda, pattern: '4:2'}"), "recipe.yaml:4: step wanda: pattern '4:2' must keep fewer than all"),
    (
        rules("{method: pb_llm, salient: 1:8}"),
        "recipe.yaml:4: step pb_llm: salient is the number 68: YAML reads 1:8 as",
    ),
    (rules("{method: pb_llm, salient: 2.5}"), "recipe.yaml:4: step pb_llm: salient is 2.5; a fraction lies in 0..1"),
    (
        rules("{method: pb_llm, salient: [1]}"),
        "recipe.yaml:4: step pb_llm: salient is [1]; it must be a number or text",
    ),
    (rules("{method: pb_llm, salient_bits: 5}"), "recipe.yaml:4: step pb_llm: salient_bits is 5; it must be 4 or 8 or"),
    (
        rules("{method: eora, rank: yes}"),
        "recipe.yaml:4: step eora: rank is true; it must be a whole number at least 1",
    ),
    (rules("{method: eora}"), "recipe.yaml:4: step eora: give either rank or share"),
    (
        rules(TWO_STEPS % ("gptq, bits: 12", "svd, rank: 1")),
        "recipe.yaml:4: step gptq: bits is 12; it must lie in 1..8",
    ),
    (rules(TWO_STEPS % ("[gptq]", "svd, rank: 1")), "recipe.yaml:4: step alternate: a step needs the key"),
    (rules(TWO_STEPS % ("rtn", "rtn")), "low_rank is the method 'rtn', which makes no low-rank term"),
    # YAML
    ("", "recipe.yaml: a recipe is a map that starts with version: 1; this is empty"),
    ("- a\n- b", "recipe.yaml: a recipe is a map that starts with version: 1; this is a list"),
    ("version 1", "recipe.yaml: a recipe is a map that starts with version: 1; this is a single value"),
    (with_line("seed: 1\nseed: 2"), 'recipe.yaml:3: the key "seed" is already at recipe.yaml:2; remove one of them'),
    (with_line("seed:\n\t3"), "recipe.yaml:3: this is not YAML (found character '\\t' that cannot start any token)"),
    (with_line('name: "a'), "this is not YAML (found unexpected end of stream)"),
    (with_line("1: a"), 'recipe.yaml:2: the key 1 is not text; write it as "1"'),
    (with_line("? [a]\n: b"), "recipe.yaml:2: a key is a list or a map; write a word"),
    (with_line("name: !!python/object:os.system ls"), "recipe.yaml:2: the tag tag:yaml.org,2002:python/object:os.syst"),
    (with_line("name: !!set {a}"), "recipe.yaml:2: the tag tag:yaml.org,2002:set is not allowed here"),
    (with_line("seed: !!int x"), "recipe.yaml:2: x is not a value (invalid literal for int()"),
    (with_line("seed: *a"), "recipe.yaml:2: this is not YAML (found undefined alias"),
    ("version: 1\n---\nversion: 1", "recipe.yaml:2: this is not YAML (but found another document)"),
    ("version: 1\x00", "recipe.yaml: this is not YAML (unacceptable character"),
    (with_line("name: " + "[" * 5000), "recipe.yaml: entries are nested too deeply for a recipe"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[sentence[:60] for _, sentence in WRONG])
def test_one_sentence_says_what_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    said = str(caught.value)
    assert sentence in said
    assert "\n" not in said
    assert "pydantic" not in said.lower()


def test_small_files_that_stand_for_huge_ones_are_refused() -> None:
    text = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(RecipeError, match="at most 50000 entries"):
        parse(text, "bomb.yaml")


def test_plain_values_are_checked_alike_and_name_the_path() -> None:
    with pytest.raises(RecipeError, match=r'rules\[0\].steps\[0\].bit: unknown key "bit" in step rtn; did you mean'):
        read_recipe({"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bit": 3}]}]})
    with pytest.raises(RecipeError, match="the recipe has no version"):
        read_recipe({"rules": []})
    with pytest.raises(RecipeError, match="the key 3 is not text"):
        read_recipe({"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", 3: 3}]}]})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.yaml cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\x80\x81\xff")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        read_recipe(str(binary))
