"""Options that an engine multiplies, for a target with `engine:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from llmcompress.allocation.distortion import Steps
from llmcompress.allocation.gguf_sizes import gguf_type
from llmcompress.compression.job import Job
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.export import check_model
from llmcompress.formats.gguf.write import expert_stacks
from llmcompress.kernels.cpu import prepare as cpu
from llmcompress.kernels.gpu import prepare as gpu
from llmcompress.methods.grids.gguf import GGUF, can_learn, fitting
from llmcompress.methods.layer import sketch, step
from llmcompress.methods.trellises.exl3 import MOST_BITS
from llmcompress.models.dense.families import Linear
from llmcompress.recipe.rules import InputRounding
from llmcompress.recipe.target import EXPORTS, OUR_ENGINES
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight
from llmcompress.weight.runtime_formats import (
    GGUF_BLOCK,
    OBSTACLES,
    WITH_TABLES,
    vllm_expert_obstacle,
    vllm_inputs_obstacle,
)
from llmcompress.weight.superblocks import SUPERBLOCK


def _kernel_obstacle(device: str, w: Weight) -> str | None:
    """Return the reason why no kernel of a device, cpu or cuda, multiplies by `w`; None if one does."""
    is_able = cpu.is_supported(w) if device == "cpu" else gpu.is_supported(w)
    return None if is_able else f"{describe(w)} has no kernel for {device}, and would be decoded at every call"


ENGINE_OBSTACLES = OBSTACLES | {
    "transformers": partial(_kernel_obstacle, "cpu"),
    "transformers-cuda": partial(_kernel_obstacle, "cuda"),
}
POLISH: dict[str, Any] = {"method": "refine", "passes": 1}
FOUR_BITS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "group_size": 128, "narrow_range": True},
    {"bits": 4, "group_size": 64, "narrow_range": True},
    {"bits": 4, "group_size": 32, "narrow_range": True},
    {"format": "nvfp4"},  # not mxfp4: some GPUs round its inputs to 4 bits too
)
EIGHT_BITS: tuple[dict[str, Any], ...] = ({"bits": 8, "narrow_range": True}, {"format": "fp8"})


AFFINE_BITS = (2, 3, 4, 5, 6, 8)  # for MLX
# For llama.cpp, by what fills the width; sensitivities are measured with the first
TYPES_OF_SUPERBLOCKS = ("IQ3_XXS", "IQ2_XXS", "IQ2_S", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
TYPES_OF_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TYPES_OF_TABLES = ("IQ4_XS", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
POLISHED = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "Q5_0")  # which `refine` makes better, and keeps


def options_for(engine: str, linear: Linear, given: Sequence[Steps] | None) -> tuple[Steps, ...]:
    """Return the options of a linear: all that are `given`, or the default ones that the engine multiplies.

    Raises RecipeError for a given option that the engine does not multiply, and for a linear without options.
    """
    if given is not None:
        for steps in given:
            if (why := _obstacle(engine, linear, steps)) is not None:
                raise RecipeError(
                    f"options: {engine} does not multiply {_spell(steps)} of {linear.name} ({why}); drop this "
                    f"option, or give the layer a rule of its own"
                )
        return tuple(given)
    defaults = default_options(engine, linear.shape[1])
    options = tuple(steps for steps in defaults if _obstacle(engine, linear, steps) is None)
    if not options:
        why = _obstacle(engine, linear, defaults[-1])
        raise RecipeError(f"target: {engine} multiplies no form of {linear.name} ({why}); drop engine")
    return options


def default_options(engine: str, width: int) -> tuple[Steps, ...]:
    """Return the default options of linears with so many inputs.

    For llama.cpp its types, for MLX and ExLlamaV3 their bits; for vLLM grids and floats, those of four bits with one
    `refine`.
    """
    if engine == "llama.cpp":
        return _gguf_steps(TYPES_OF_BLOCKS if width % SUPERBLOCK else TYPES_OF_SUPERBLOCKS)
    if engine == "mlx":
        return tuple((step({"method": "gptq", **form}), step(POLISH)) for form in _affine(width))
    if engine == "exllamav3":
        return tuple((step({"method": "exl3", "bits": bits}),) for bits in range(1, MOST_BITS + 1))
    four = tuple((step({"method": "gptq", **form}), step(POLISH)) for form in FOUR_BITS)
    return (*four, *((step({"method": "gptq", **form}),) for form in EIGHT_BITS))


def engine_table_options(engine: str, size: tuple[int, int], only_looked_up: bool) -> tuple[Steps, ...]:
    """Return the options of a table `[rows, width]`; none where the engine reads it as it is."""
    if engine not in ("llama.cpp", "mlx") or size[1] % GGUF_BLOCK:
        return ()
    if engine == "mlx":
        return tuple((step({"method": "rtn" if only_looked_up else "gptq", **form}),) for form in _affine(size[1]))
    return _gguf_steps(TYPES_OF_BLOCKS if size[1] % SUPERBLOCK else TYPES_OF_TABLES)


def _affine(width: int) -> Iterator[dict[str, Any]]:
    """Yield MLX's grids with offsets, in groups of 64 columns where these fill the width, else of 32."""
    for bits in AFFINE_BITS:
        yield {"bits": bits, "group_size": 32 if width % 64 else 64, "symmetric": False}


def _gguf_steps(types: Sequence[str]) -> tuple[Steps, ...]:
    """Return steps that fill types, with one `refine` where it keeps the type."""
    return tuple(
        (step({"method": "gguf", "type": kind}), *([step(POLISH)] if kind in POLISHED else [])) for kind in types
    )


def check_source(job: Job, engine: str) -> None:
    """Raise InputError for a model that an engine does not run, RecipeError for a term that its files have no place for
    or for a missing package."""
    if (form := EXPORTS.get(engine)) is None:
        return
    source, distill = job.source, job.recipe.distill
    if source.sizes:
        raise InputError(
            f"blocks of {source.name} have widths of their own, which {form} has no place for; leave the engine out"
        )
    if form != "gguf" and distill is not None and any(stage.adapt for _, stage in distill.stages()):
        raise RecipeError(f"distill: adapt adds low-rank terms, which {form} has no place for; leave adapt out")
    check_model(source.folder, source.config_entries(), form, source.trust_remote_code)


def check_rules(job: Job, engine: str) -> None:
    """Raise RecipeError for steps of a recipe whose outcome the engine does not multiply, or look up."""
    linears = job.arch.linears()
    if job.recipe.kv_cache and engine != "vllm":
        raise RecipeError(f"kv_cache: {engine} reads no scales of keys and values; leave kv_cache: out")
    for name, steps in job.steps.items():
        if (why := _obstacle(engine, linears[name], steps, job.inputs.get(name))) is not None:
            raise RecipeError(
                f"rules: {engine} does not multiply {_spell(steps)} of {name} ({why}); change the rule, or leave the "
                f"layer as it is by steps: []"
            )
    for name, steps in job.tables.items():
        if engine not in (*WITH_TABLES, *OUR_ENGINES):
            raise RecipeError(f"{engine} has no compressed {name}; leave it as it is by embeddings: [] and head: []")
        if engine in OUR_ENGINES and name == job.arch.embedding and not job.arch.tied:
            continue  # it is looked up alone
        rows, width = job.source.tensors[f"{name}.weight"].shape
        if (why := _obstacle_of_shape(engine, name, (rows, width), steps)) is not None:
            raise RecipeError(f"{engine} does not read {_spell(steps)} of {name} ({why}); give it other steps")
    if engine == "llama.cpp":
        _check_learning(job)
    stacks = expert_stacks(job.source.skeleton()) if engine in ("llama.cpp", "vllm") else {}
    _check_experts(job, engine, stacks)
    if engine == "vllm":
        experts = {layer for layers in stacks.values() for layer in layers}
        for names in (names for block in job.arch.blocks for names in block.siblings()):
            if experts.isdisjoint(names):
                _check_siblings(job, names)


def _check_learning(job: Job) -> None:
    """Raise RecipeError for types of llama.cpp that do not hold what the recipe's learning would leave."""
    recipe, linears = job.recipe, job.arch.linears()
    stages = () if recipe.distill is None else [stage for _, stage in recipe.distill.stages()]
    rates = {kind for each in (recipe.reconstruct, *stages) if each is not None for kind in each.rates}
    lists: dict[str, tuple[Steps, ...]] = {name: (steps,) for name, steps in job.steps.items()}
    if recipe.target is not None:
        lists |= {name: options_for("llama.cpp", linears[name], recipe.options) for name in job.assignment.unruled}
    for name, steps in ((name, each[0]) for name, options in lists.items() for each in options):
        if isinstance(steps, GGUF) and not can_learn(kind := fitting(steps.type, linears[name].shape[1]), rates):
            learned = " and ".join(sorted(rates & {"scales", "factors", "codes"}))
            raise RecipeError(
                f"{kind} of {name} does not hold {learned} that learn; leave reconstruct: (--tune) and distill: out, "
                f"or give types such as Q8_0"
            )


def _check_siblings(job: Job, names: Sequence[str]) -> None:
    """Raise RecipeError for linears that vLLM stacks and that would not have one form."""
    chosen = set(job.assignment.unruled) if job.recipe.target is not None else set()
    linears, kinds = job.arch.linears(), dict[str, str]()
    for name in names:
        kinds.setdefault("what the target chooses" if name in chosen else _form_of(job, linears[name]), name)
    if len(kinds) > 1:
        both = " and ".join(f"{name} has {kind}" for kind, name in sorted(kinds.items(), key=lambda pair: pair[1]))
        raise RecipeError(f"rules: vLLM multiplies {', '.join(names)} as one matrix, and {both}; give them one rule")


def _check_experts(job: Job, engine: str, each: Mapping[str, Sequence[str]]) -> None:
    """Raise RecipeError for experts that would not have one type in a block, and for a type that no expert may have.

    llama.cpp stacks gates, ups and downs apart, as in `each`; vLLM has one type for all three.
    """
    stacks, linears = dict[str, list[str]](), job.arch.linears()
    for name, layers in each.items():
        stacks.setdefault(name if engine == "llama.cpp" else name.rpartition(".")[0], []).extend(layers)
    for layers in stacks.values():
        if job.recipe.target is not None and layers[0] in job.assignment.unruled:
            raise RecipeError(
                f"target: {engine} holds all experts of a block in one type, and a target would choose for each "
                f"({layers[0]} first); give experts a rule, or name a recipe without a target"
            )
        kinds = {_expert_type(job, engine, linears[layer]) for layer in layers}
        if len(kinds) > 1:
            raise RecipeError(
                f"rules: {engine} holds all experts of a block in one type, and {layers[0]} and its neighbours would "
                f"have {' and '.join(sorted(kinds))}; give them the same steps"
            )


def _expert_type(job: Job, engine: str, linear: Linear) -> str:
    """Return the type of an expert's matrix in an engine. Raises RecipeError for one that no expert may have there."""
    steps, inputs = job.steps.get(linear.name), job.inputs.get(linear.name)
    if steps is None:
        return "no type"
    w = sketch(linear.name, linear.shape, steps)
    if engine == "llama.cpp":
        return gguf_type(w, steps).name
    why = vllm_expert_obstacle(w, inputs.format if inputs else None, inputs is not None and inputs.is_calibrated)
    if why is not None:
        raise RecipeError(f"rules: {linear.name} is a matrix of an expert: {why}")
    return _form_of(job, linear)


def _form_of(job: Job, linear: Linear) -> str:
    """Return the form that the recipe gives a linear and its inputs, in words."""
    steps, inputs = job.steps.get(linear.name), job.inputs.get(linear.name)
    form = "no type" if steps is None else describe(sketch(linear.name, linear.shape, steps))
    return f"{form} with {inputs}" if inputs else form


def _obstacle(engine: str, linear: Linear, steps: Steps, inputs: InputRounding | None = None) -> str | None:
    if linear.transposed and engine not in OUR_ENGINES:
        return "it is no plain linear layer"
    if inputs is not None and engine not in (*OUR_ENGINES, "vllm"):
        return f"{engine} has no {inputs}; drop inputs: from the rule"
    if inputs is not None and engine == "vllm":
        return vllm_inputs_obstacle(sketch(linear.name, linear.shape, steps), inputs.format, inputs.is_calibrated)
    return _obstacle_of_shape(engine, linear.name, linear.shape, steps)


def _obstacle_of_shape(engine: str, name: str, size: tuple[int, int], steps: Steps) -> str | None:
    why = ENGINE_OBSTACLES[engine](stored := sketch(name, size, steps))
    if why is None and engine == "llama.cpp":
        try:
            gguf_type(stored, steps)
        except UnfitError as error:
            return str(error)
    return why


def _spell(steps: Steps) -> str:
    """Return steps as a recipe spells them, without defaults."""
    each = (config.model_dump(mode="json", exclude_defaults=True) for config in steps)
    plain = zip(steps, each, strict=True)
    return " > ".join(", ".join([config.method, *(f"{k}: {v}" for k, v in own.items())]) for config, own in plain)
