"""A relaxed weight is the weight: the same bits before a step, the same layout after any, the formula's gradients."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmcompress.errors import NumericsError, RecipeError
from llmcompress.weight import expression
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense, describe, matmul
from llmcompress.weight.hadamard import rotate
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import (
    Bitmap,
    Codebook,
    Dense,
    Grid,
    LowRank,
    Minifloat,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Transpose,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    shape,
)
from llmcompress.weight.trainable.masters import Outside
from llmcompress.weight.trainable.relax import KINDS, Relaxation, RelaxedLinear, RelaxedWeight, relax
from llmcompress.weight.trainable.straight_through import (
    ESTIMATORS,
    Estimator,
    nearest_codes,
    slope,
    straight_cast,
    straight_codes,
)
from tests.builders import grid, seeded
from tests.tiers import expressions

EXPRESSIONS = expressions(seed=3, count=40)
SUBSETS = [frozenset(c) for n in range(len(KINDS) + 1) for c in itertools.combinations(KINDS, n)]
ALL = Relaxation(frozenset(KINDS))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "w" in metafunc.fixturenames:
        metafunc.parametrize("w", EXPRESSIONS)


def inputs(w: Weight, rows: int = 5) -> Tensor:
    return torch.randn(rows, shape(w)[1], generator=seeded(9))


def elsewhere(w: Weight, distance: float = 0.5) -> Tensor:
    """A target near what `w` stands for."""
    return dense(w) + distance * torch.randn(shape(w), generator=seeded(7))


def assert_same_bits(a: Weight, b: Weight) -> None:
    (header, tensors), (header_, tensors_) = encode(a), encode(b)
    assert header == header_ and list(tensors) == list(tensors_)
    different = [name for name in tensors if not torch.equal(tensors[name], tensors_[name])]
    assert not different, f"{different} are not the same bits"


def layout(w: Weight) -> object:
    header, tensors = encode(w)
    return header, {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()}


def steps(module: RelaxedWeight, target: Tensor, count: int, rate: float = 0.05, confined: bool = False) -> None:
    """Adam on the squared distance of the matrix to a target, with weight decay, as somebody might have it."""
    if not module.kinds():
        return
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(count):
        optimizer.zero_grad()
        (module.weight() - target).square().sum().backward()
        optimizer.step()
        if confined:
            module.settle()


# --- before any step ------------------------------------------------------------------------------------------------


def test_freezing_returns_the_same_bits(w: Weight) -> None:
    for trains in SUBSETS:
        assert_same_bits(relax(w, Relaxation(trains)).freeze(), w)
    for estimator in ESTIMATORS:
        for distance in (0.1, 10.0):
            assert_same_bits(relax(w, Relaxation(frozenset(KINDS), estimator), elsewhere(w, distance)).freeze(), w)


def test_the_matrix_is_the_dense_one(w: Weight) -> None:
    for trains in SUBSETS:
        value = relax(w, Relaxation(trains), elsewhere(w)).weight()
        assert value.dtype == torch.float32 and torch.equal(value, dense(w))


def test_forward_is_the_product(w: Weight) -> None:
    x = inputs(w, rows=6)
    reach = (x.abs() @ dense(w).abs().T).max()
    for module in (relax(w, Relaxation(frozenset())), relax(w, ALL, elsewhere(w))):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            found = module(x.to(dtype).reshape(2, 3, -1))
            away = (found.reshape(6, -1) - matmul(x.to(dtype), w)).abs().max()  # the same sums in another order
            assert found.dtype == dtype and away <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * reach


def test_kinds_are_exactly_what_trains(w: Weight) -> None:
    everything = relax(w, ALL).kinds()
    for trains in SUBSETS:
        module = relax(w, Relaxation(trains))
        parameters = dict(module.named_parameters())
        assert parameters.keys() == module.kinds().keys() and all(p.requires_grad for p in parameters.values())
        assert all(p.dtype == torch.float32 and p.numel() for p in parameters.values())
        assert module.kinds() == {name: kind for name, kind in everything.items() if kind in trains}


def test_frozen_tensors_have_the_bytes_of_a_file(w: Weight) -> None:
    module = relax(w, Relaxation(frozenset()))
    assert not list(module.parameters())
    held = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert held == sum(tensor.numel() * tensor.element_size() for tensor in encode(w)[1].values())


def test_casting_rounds_nothing(w: Weight) -> None:
    for relaxation in (ALL, Relaxation(frozenset())):
        module = relax(w, relaxation, elsewhere(w))
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for name, tensor in module.to(torch.bfloat16).state_dict().items():
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        assert_same_bits(module.freeze(), w)


def test_it_moves_to_another_device(w: Weight) -> None:
    module = relax(w, Relaxation(frozenset({"codes", "scales"}))).to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("trains", [frozenset(KINDS), frozenset()], ids=["all", "nothing"])
def test_relaxing_shares_no_memory_with_the_weight(w: Weight, trains: frozenset[str]) -> None:
    before = {name: tensor.clone() for name, tensor in encode(w)[1].items()}
    module = relax(w, Relaxation(trains), elsewhere(w))
    frozen = module.freeze()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert_same_bits(frozen, w)
    assert all(torch.equal(before[name], tensor) for name, tensor in encode(w)[1].items())


def test_each_number_has_its_kind() -> None:
    size = (4, 8)
    values, signs = Dense(torch.ones(size)), torch.ones(8, dtype=torch.bool)
    factors = LowRank(Dense(torch.ones(4, 2)), Sum((Dense(torch.ones(2, 8)), grid((2, 8), 4, 8, 0, True))))
    salient = Where(Bitmap(torch.eye(4, 8).bool()), values, grid(size, 2, 8, 0, False))
    w = Sum((salient, RotatedInputs(factors, signs, 8), RotatedInputs(values, signs, 8)))
    assert relax(w, ALL).kinds() == {
        "0_inside_values": "values",
        "0_outside_codes": "codes",
        "0_outside_scale": "scales",
        "1_inner_left_values": "factors",
        "1_inner_right_0_values": "factors",
        "1_inner_right_1_codes": "codes",
        "1_inner_right_1_scale": "scales",
        "2_inner_values": "values",
    }


# --- after steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_keep_the_layout_and_what_trains_is_what_is_stored(w: Weight, estimator: Estimator) -> None:
    for rate in (0.01, 30.0):
        module = relax(w, Relaxation(frozenset(KINDS), estimator), elsewhere(w))
        steps(module, elsewhere(w, 3.0), 3, rate)
        frozen = module.freeze()
        assert layout(frozen) == layout(w) and describe(frozen) == describe(w)
        assert bool(dense(frozen).isfinite().all()) and torch.equal(module.weight(), dense(frozen))
        assert all(not tensor.requires_grad for tensor in encode(frozen)[1].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_one_kind_leaves_the_others_as_they_are(w: Weight, kind: str) -> None:
    module = relax(w, Relaxation(frozenset({kind})), elsewhere(w))
    steps(module, elsewhere(w, 3.0), 3)
    before, after = encode(w)[1], encode(module.freeze())[1]
    for name in before.keys() - module.kinds().keys():
        assert torch.equal(before[name], after[name]), f"training {kind} changed {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(w: Weight, kind: str) -> None:
    target = nearby(w, kind)
    start = float((dense(w) - target).square().sum())
    if start == 0:  # nothing to train, or nothing that it changes
        return
    reached = []
    for rate in (1e-2, 1e-4, 0.2):  # expressions differ in curvature by many orders
        module = relax(w, Relaxation(frozenset({kind})))
        steps(module, target, 30, rate)
        reached.append(float((dense(module.freeze()) - target).square().sum()))
        if reached[-1] < start:
            return
    pytest.fail(f"{start} -> {reached}")


def nearby(w: Weight, kind: str) -> Tensor:
    """The matrix after a move of what is of that kind, so that training can reach it."""
    module = relax(w, Relaxation(frozenset({kind})))
    with torch.no_grad():
        for name in module.kinds():
            master = module.get_parameter(name)
            move = torch.randn(master.shape, generator=seeded(5))
            master.add_(move.sign() if kind == "codes" else 0.1 * master * move)
    return dense(module.freeze())


def test_training_moves_codes_to_a_target() -> None:
    """Codes that start anywhere reach the nearest codes of a target, where plain rounding is the best there is."""
    for levels, estimator in [(2, "plain"), (2, "reste"), (2, "biper"), (3, "plain"), (4, "reste")]:
        w, wanted = (grid((6, 20), levels, 8, seed, symmetric=True) for seed in (1, 2))
        wanted = replace(wanted, scale=w.scale)
        module = relax(w, Relaxation(frozenset({"codes"}), estimator))
        steps(module, dense(wanted), 400, rate=0.05, confined=True)
        found = module.freeze()
        assert isinstance(found, Grid)
        share = float((found.codes == wanted.codes).float().mean())
        assert share > 0.95, f"{levels} levels, {estimator}: only {share:.0%} of the codes arrived"


def test_confining_latents_changes_nothing_that_is_stored(w: Weight) -> None:
    for estimator in ESTIMATORS:
        module = relax(w, Relaxation(frozenset(KINDS), estimator))
        steps(module, elsewhere(w, 3.0), 2, rate=1.0)
        before = module.freeze()
        module.settle()
        assert_same_bits(module.freeze(), before)


def test_a_latent_that_ran_away_can_come_back() -> None:
    module = relax(grid((1, 2), 2, 2, 0, symmetric=True), Relaxation(frozenset({"codes"})))
    latents = module.get_parameter("codes")
    for confined in (False, True):
        with torch.no_grad():
            latents.copy_(torch.tensor([1.7, -0.9]))
        latents.grad = None
        if confined:
            module.settle()
        module.weight().sum().backward()
        assert bool((torch.as_tensor(latents.grad) != 0).all()) == confined


def test_pruned_entries_stay_zero_and_the_others_train() -> None:
    size = (6, 16)
    inside = torch.rand(size, generator=seeded(0)) < 0.5
    values = Dense(torch.randn(size, generator=seeded(1)).bfloat16())
    module = relax(Where(Bitmap(inside), values, Zero(size)), ALL)
    assert module.get_parameter("inside_values").numel() == int(inside.sum()), "nothing is held for what is pruned"
    steps(module, torch.ones(size), 20, rate=1.0)
    assert torch.equal(module.weight() == 0, ~inside) and torch.equal(dense(module.freeze()) == 0, ~inside)
    away = (dense(module.freeze()) - values.values.float())[inside].abs()
    assert bool((away > 0.1).all()), "what is kept has moved"


@pytest.mark.parametrize("salient_train", [False, True], ids=["salient values rest", "salient values train"])
def test_salient_weights_stay_where_they_are(salient_train: bool) -> None:
    """Their places, that is; their values too where codes alone train. All around them moves."""
    size = (6, 16)
    inside = torch.rand(size, generator=seeded(0)) < 0.25
    values = 10 + torch.rand(size, generator=seeded(1)).bfloat16()  # far beyond what the grid could hold
    w = Where(Bitmap(inside), Dense(values), grid(size, 2, 8, 0, symmetric=True))
    kinds = ["codes", "values"] if salient_train else ["codes"]
    module = relax(w, Relaxation(frozenset(kinds)))
    target = torch.where(inside, 12.0, -dense(w))  # all codes the other way
    steps(module, target, 40, rate=0.1, confined=True)
    found = module.freeze()
    assert isinstance(found, Where) and torch.equal(found.index.inside, inside)
    after = dense(found)
    assert float((after.sign() == target.sign())[~inside].float().mean()) > 0.9, "codes around them learn"
    assert torch.equal(after[inside], values.float()[inside]) != salient_train
    assert float((after[inside] - 12).abs().max()) < (0.5 if salient_train else 2.1)


# --- gradients ------------------------------------------------------------------------------------------------------


def leaves64(module: RelaxedWeight) -> dict[str, Tensor]:
    """Return what the module would store of its parameters, as float64 leaves."""
    tensors = encode(module.freeze())[1]
    found = {}
    for name, kind in module.kinds().items():
        number = tensors[name] if kind != "codes" else nearest_codes(module.get_parameter(name).detach(), 256)
        found[name] = number.detach().double().requires_grad_(True)
    return found


def formula(w: Weight, leaves: dict[str, Tensor], path: str = "", shown: Tensor | None = None) -> Tensor:
    """`dense` once more, in float64 and entry by entry, from leaves by their paths."""

    def placed(name: str, own: Tensor) -> Tensor:
        if path + name not in leaves:
            return own.double()
        place = torch.ones(own.shape, dtype=torch.bool) if shown is None else shown.expand(own.shape)
        return torch.zeros(own.shape, dtype=torch.float64).masked_scatter(place, leaves[path + name])

    match w:
        case Zero(size):
            return torch.zeros(size, dtype=torch.float64)
        case Dense(values):
            return placed("values", values)
        case Grid(codes, scale, zero, levels, group_size):
            width = codes.shape[1]
            scales = leaves[path + "scale"].reshape(scale.shape) if path + "scale" in leaves else scale.double()
            of_column = [scales[:, column // group_size] for column in range(width)]
            middle = torch.full(scale.shape, (levels - 1) / 2) if zero is None else zero
            centres = [middle[:, column // group_size].double() for column in range(width)]
            return (placed("codes", codes) - torch.stack(centres, 1)) * torch.stack(of_column, 1)
        case TrellisCodes(codes, scale):
            scales = leaves[path + "scale"].reshape(scale.shape) if path + "scale" in leaves else scale.double()
            return dense(replace(w, scale=torch.ones_like(scale))).double() * scales
        case Codebook(codes, centroids, scale, width):
            scales = leaves[path + "scale"].reshape(scale.shape) if path + "scale" in leaves else scale.double()
            entries = leaves.get(path + "centroids", centroids.double()).reshape(centroids.shape)
            rows = [torch.cat([entries[int(code)] for code in row])[:width] for row in codes]
            return torch.stack(rows) * scales
        case Minifloat():  # none of which trains
            return dense(w).double()
        case LowRank(left, right):
            return formula(left, leaves, path + "left_") @ formula(right, leaves, path + "right_")
        case Where(index, inside, outside):
            here = index.inside.expand(shape(w))
            rest = ~here if shown is None else shown & ~here
            a = formula(inside, leaves, path + "inside_", here if shown is None else shown & here)
            return torch.where(here, a, formula(outside, leaves, path + "outside_", rest))
        case RotatedInputs(inner, signs, block):
            turned = dense(RotatedInputs(Dense(torch.eye(len(signs))), signs, block)).double()  # R.T
            return formula(inner, leaves, path + "inner_") @ turned
        case ScaledInputs(inner, columns):
            return formula(inner, leaves, path + "inner_", shown) * leaves.get(path + "columns", columns.double())
        case Transpose(inner):
            lying = None if shown is None else shown.expand(shape(w)).T
            return formula(inner, leaves, path + "inner_", lying).T
        case Sum(parts):
            return torch.stack([formula(part, leaves, f"{path}{i}_", shown) for i, part in enumerate(parts)]).sum(0)
    raise TypeError(type(w).__name__)


def test_gradients_are_those_of_the_formula_in_float64(w: Weight) -> None:
    module = relax(w, ALL, elsewhere(w))
    slopes = torch.randn(shape(w), generator=seeded(4))
    if not module.kinds():
        return
    (module.weight() * slopes).sum().backward()
    leaves = leaves64(module)
    expected = formula(w, leaves)
    torch.testing.assert_close(module.weight().detach().double(), expected.detach(), rtol=1e-4, atol=1e-4)
    (expected * slopes.double()).sum().backward()
    for name, leaf in leaves.items():
        if leaf.grad is None or module.get_parameter(name).grad is None:
            assert leaf.grad is None or not bool(leaf.grad.any())
            continue
        reach = max(1.0, float(leaf.grad.abs().max()))
        torch.testing.assert_close(module.get_parameter(name).grad.double(), leaf.grad, rtol=1e-4, atol=1e-4 * reach)


@pytest.mark.parametrize("terms", [False, True], ids=["alone", "beside a low-rank term"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_codes_that_stay_are_turned_back_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, terms: bool) -> None:
    """No input is rotated; products and gradients of scales are those of the rotated basis, in float64."""
    stored = grid((12, 64), levels=4, group_size=64, seed=1, symmetric=False)
    turned = RotatedInputs(stored, torch.arange(64) % 3 == 0, 16)
    w: Weight = Sum((turned, LowRank(Dense(torch.ones(12, 1)), Dense(torch.ones(1, 64))))) if terms else turned
    module, x = relax(w, Relaxation(frozenset({"scales"}))), inputs(w).to(dtype)
    scale = stored.scale.double().clone().requires_grad_()
    codes = dense(replace(stored, scale=torch.ones_like(stored.scale))).double()
    slow = (rotate(x.double(), turned.signs, turned.block) @ codes.T) * scale[:, 0]
    slow.square().sum().backward()
    monkeypatch.setattr(expression, "rotate", None)
    found = module(x) - (x.sum(-1, keepdim=True) if terms else 0)
    found.square().sum().backward()
    close = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(found.double(), slow, rtol=close, atol=close)
    [name] = module.kinds()
    torch.testing.assert_close(module.get_parameter(name).grad, scale.grad.flatten().float(), rtol=1e-4, atol=1e-3)


def test_products_in_another_dtype_are_not_made_of_what_was_rounded_for_the_last(w: Weight) -> None:
    module, x = relax(w, ALL, elsewhere(w)), inputs(w)
    first = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert torch.equal(module(x), first)


def test_gradients_through_the_product_are_those_through_the_matrix(w: Weight) -> None:
    a, b = relax(w, ALL, elsewhere(w)), relax(w, ALL, elsewhere(w))
    if not a.kinds():
        return
    x = inputs(w)
    a(x).square().sum().backward()
    (x @ b.weight().T).square().sum().backward()
    for name in a.kinds():
        one, other = a.get_parameter(name).grad, b.get_parameter(name).grad
        if one is None or other is None:
            assert one is other
            continue
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


# --- in a training loop ---------------------------------------------------------------------------------------------


def gradients(module: nn.Module) -> Iterator[Tensor | None]:
    return (p.grad for p in module.parameters())


def test_checkpointing_and_copies_change_nothing(w: Weight) -> None:
    a = relax(w, ALL, elsewhere(w))
    if not a.kinds():
        return
    b, x = copy.deepcopy(a), inputs(w)
    a(x).square().sum().backward()
    checkpoint(b, x, use_reentrant=False).square().sum().backward()
    for one, other in zip(gradients(a), gradients(b), strict=True):
        assert one is other or torch.equal(one, other)


def test_it_trains_under_autocast(w: Weight) -> None:
    module, x = relax(w, ALL, elsewhere(w)), inputs(w)
    with torch.autocast("cpu", torch.bfloat16):
        found, matrix = module(x), module.weight()
    assert torch.equal(matrix, dense(w)), "the matrix itself is float32"
    reach = max(1.0, float(matmul(x, w).abs().max()), float(matmul(x.abs(), Dense(dense(w).abs())).max()))
    assert (found.float() - matmul(x, w)).abs().max() <= 0.05 * reach
    if module.kinds():
        found.float().square().sum().backward()
        assert all(g is None or bool(g.isfinite().all()) for g in gradients(module))


def test_a_state_dict_brings_everything(w: Weight) -> None:
    a = relax(w, ALL, elsewhere(w))
    steps(a, elsewhere(w), 2)
    b = relax(w, ALL)
    b.load_state_dict({name: tensor.clone() for name, tensor in a.state_dict().items()})
    assert all(torch.equal(one, other) for one, other in zip(a.parameters(), b.parameters(), strict=True))
    assert_same_bits(b.freeze(), a.freeze())


def test_a_layer_trains_and_goes_back(w: Weight) -> None:
    linear = CompressedLinear.of(w, torch.randn(shape(w)[0], generator=seeded(2)).bfloat16())
    relaxed = RelaxedLinear.of(linear, ALL, elsewhere(w))
    x = inputs(w)
    torch.testing.assert_close(relaxed(x), linear(x), rtol=1e-5, atol=1e-5)  # scales may multiply the product instead
    assert relaxed(x.bfloat16()).dtype == torch.bfloat16
    again = relaxed.freeze()
    assert again.layout == linear.layout and torch.equal(again.bias, linear.bias)
    assert all(torch.equal(tensor, linear.payload()[name]) for name, tensor in again.payload().items())
    trainable = {name for name, p in relaxed.named_parameters() if p.requires_grad}
    assert trainable == {f"relaxed.{name}" for name in relaxed.relaxed.kinds()}
    steps(relaxed.relaxed, elsewhere(w), 2)
    assert relaxed.freeze().layout == linear.layout
    assert RelaxedLinear.of(CompressedLinear.of(w), ALL).freeze().bias is None


# --- scales, latents and estimators ---------------------------------------------------------------------------------


def test_scales_stay_what_float16_can_hold() -> None:
    w = grid((3, 8), 4, 4, 0, symmetric=True)
    w.scale[0, 0] = 0.0
    module = relax(w, Relaxation(frozenset({"scales"})))
    with torch.no_grad():
        module.get_parameter("scale").copy_(torch.tensor([5.0, -1.0, 0.0, 1e9, math.inf, 1e-12]))
    frozen = module.freeze()
    assert frozen.scale.flatten().tolist() == [0.0, 2.0**-24, 2.0**-24, 65504.0, 65504.0, 2.0**-24]
    assert torch.equal(module.weight(), dense(frozen))
    module.weight().sum().backward()
    moved = module.get_parameter("scale").grad
    centred = (w.codes.float() - 1.5).reshape(3, 2, 4).sum(2).flatten()
    centred[0] = 0.0
    assert torch.equal(moved, centred), "the gradient passes the ends, so that a scale can come back"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["codes", "scale"])
def test_not_a_number_is_refused(name: str, estimator: Estimator) -> None:
    module = relax(grid((3, 8), 2, 4, 0, symmetric=True), Relaxation(frozenset(KINDS), estimator))
    with torch.no_grad():
        module.get_parameter(name)[0] = math.nan
    with pytest.raises(NumericsError, match=name):
        module.freeze()


def test_values_stay_what_their_dtype_can_hold() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        module = relax(Dense(torch.zeros(1, 3, dtype=dtype)), ALL)
        with torch.no_grad():
            module.get_parameter("values").copy_(torch.tensor([math.inf, -math.inf, 1 / 3]))
        most = torch.finfo(dtype).max
        assert dense(module.freeze()).flatten().tolist() == [most, -most, float(torch.tensor(1 / 3).to(dtype))]
        assert torch.equal(module.weight(), dense(module.freeze()))


@pytest.mark.parametrize("outside", ["code", "edge"])
def test_latents_start_at_the_target_where_it_is_in_the_cell_of_its_code(outside: Outside) -> None:
    """Beyond the range of the codes they start at its edge, in another code's cell at their own code or its edge."""
    w, target = grid((5, 33), 8, 16, 1, symmetric=False), torch.randn(5, 33, generator=seeded(3))
    module = relax(w, Relaxation(frozenset({"codes"}), outside=outside), target)
    codes, latent = w.codes.float(), module.get_parameter("codes").detach().reshape(5, 33)
    spread = [column // 16 for column in range(33)]
    units = target / w.scale[:, spread].float() + w.zero[:, spread].float()
    near, far = (units - codes).abs() < 0.49, (units - codes).abs() > 0.51
    beyond = far & ((codes == 0) & (units < 0) | (codes == 7) & (units > 7))
    for some in (near, beyond, far & ~beyond):
        assert bool(some.any())
    torch.testing.assert_close(latent[near], units[near], rtol=0, atol=1e-4)
    edge = codes + 0.498 * (units - codes).sign()
    torch.testing.assert_close(latent[beyond], edge[beyond], rtol=0, atol=1e-3)
    start = codes if outside == "code" else edge
    torch.testing.assert_close(latent[far & ~beyond], start[far & ~beyond], rtol=0, atol=1e-3)
    assert_same_bits(module.freeze(), w)


def test_latents_see_the_target_through_rotation_and_beside_other_parts() -> None:
    base = grid((6, 16), 256, 16, 1, symmetric=True)
    term = LowRank(Dense(torch.randn(6, 2, generator=seeded(1))), Dense(torch.randn(2, 16, generator=seeded(2))))
    w = RotatedInputs(Sum((base, term)), torch.rand(16, generator=seeded(3)) < 0.5, 8)
    nudge = 0.25 * base.scale.float() * torch.ones(6, 16)
    target = dense(RotatedInputs(Sum((base, term, Dense(nudge))), w.signs, 8))
    latent = relax(w, Relaxation(frozenset({"codes"})), target).get_parameter("inner_0_codes").detach()
    torch.testing.assert_close(latent.reshape(6, 16), base.codes.float() + 0.25, rtol=0, atol=1e-3)


def test_a_group_without_a_scale_has_latents_at_its_codes() -> None:
    w = grid((3, 8), 4, 4, 0, symmetric=False)
    w.scale[1] = 0.0
    module = relax(w, ALL, elsewhere(w))
    latent = module.get_parameter("codes").detach().reshape(3, 8)
    assert torch.equal(latent[1], w.codes[1].float()) and bool(latent.isfinite().all())
    assert_same_bits(module.freeze(), w)


def test_a_latent_between_two_codes_is_the_higher_one() -> None:
    """As sign(0) is +1."""
    for estimator in ESTIMATORS:
        assert nearest_codes(torch.tensor([0.5]), 2, estimator).tolist() == [1.0]
    assert nearest_codes(torch.tensor([0.5, 1.5]), 4).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("levels", [2, 3, 16, 256])
def test_plain_passes_gradients_inside_the_range_only(levels: int) -> None:
    latent = torch.tensor([-0.6, -0.4, 0.0, levels - 0.6, levels - 0.4], requires_grad=True)
    straight_codes(latent, levels).sum().backward()
    assert latent.grad.tolist() == [0, 1, 1, 1, 0]
    assert nearest_codes(latent, levels).tolist() == [0, 0, 0, levels - 1, levels - 1]


def test_reste_is_the_slope_of_its_power_function() -> None:
    x = torch.linspace(-1.95, 1.95, 40, dtype=torch.float64)
    assert bool((x.abs() > 0.01).all())
    for power in (1.0, 2.0, 3.0):
        found = slope((x + 1) / 2, 2, "reste", power)
        leaf = x.clone().requires_grad_(True)
        (leaf.sign() * leaf.abs() ** (1 / power)).sum().backward()
        far = x.abs() >= 0.1
        torch.testing.assert_close(found[far], leaf.grad[far])
        assert torch.allclose(found[~far], torch.tensor(0.1 ** (1 / power) / 0.1, dtype=torch.float64))
    assert torch.equal(slope(x, 2, "reste", 1.0), slope(x, 2, "plain")), "power 1 is plain"
    assert slope(torch.tensor([-0.6, 1.6]), 2, "reste").tolist() == [0, 0]


def test_biper_is_a_square_wave_with_the_slope_of_a_sine() -> None:
    latent = torch.linspace(-3.4, 4.4, 100, dtype=torch.float64, requires_grad=True)
    sine = (1 + torch.sin(math.pi / 4 * (2 * latent - 1))) / 2
    assert torch.equal(nearest_codes(latent, 2, "biper"), (sine >= 0.5).double())
    [expected] = torch.autograd.grad(sine.sum(), latent)
    torch.testing.assert_close(slope(latent.detach(), 2, "biper"), expected)
    inside = (latent > -0.5) & (latent < 1.5)
    assert torch.equal(nearest_codes(latent, 2, "biper")[inside], nearest_codes(latent, 2)[inside])


def test_the_power_of_reste_can_rise_while_it_trains() -> None:
    module = relax(grid((3, 8), 2, 8, 0, symmetric=True), Relaxation(frozenset({"codes"}), "reste", power=1.0))
    [latents] = module.parameters()
    [first] = torch.autograd.grad(module.weight().sum(), latents)
    module.relaxation = replace(module.relaxation, power=2.0)
    [second] = torch.autograd.grad(module.weight().sum(), latents)
    torch.testing.assert_close(second, first / 2)  # the slope at a stored code is 1 / power


def descended(estimator: Estimator, starts: Tensor, count: int, rate: float) -> tuple[Tensor, Tensor]:
    """Latents and codes of one row of signs, all pulled the other way by equal forces, after SGD."""
    row = grid((1, len(starts)), 2, len(starts), 0, symmetric=True)
    module = relax(
        replace(row, codes=(starts >= 0.5).to(torch.uint8)[None]), Relaxation(frozenset({"codes"}), estimator)
    )
    latents = module.get_parameter("codes")
    with torch.no_grad():
        latents.copy_(starts)
    force = torch.where(starts >= 0.5, 1.0, -1.0) / row.scale.float().flatten()
    optimizer = torch.optim.SGD([latents], lr=rate)
    for _ in range(count):
        optimizer.zero_grad()
        (module.weight() * force).sum().backward()
        optimizer.step()
    return latents.detach(), dense(module.freeze()).flatten() > 0


def test_reste_turns_signs_that_are_undecided_and_spares_the_others() -> None:
    """Under the same pull, which plain spends on all alike."""
    starts = torch.tensor([0.56, 0.44, 1.0, 0.0, 1.2])
    undecided = torch.tensor([True, True, False, False, False])
    latents, codes = {}, {}
    for estimator in ("plain", "reste"):
        latents[estimator], codes[estimator] = descended(estimator, starts, count=3, rate=0.015)
    assert torch.equal(codes["plain"], starts >= 0.5), "too little for plain to turn any"
    assert torch.equal(codes["reste"] != (starts >= 0.5), undecided)
    away = {estimator: (value - starts).abs()[~undecided] for estimator, value in latents.items()}
    assert bool((away["reste"] < 0.5 * away["plain"]).all())


def test_biper_brings_back_latents_that_ran_away() -> None:
    """Plain has no slope out there, so a code whose latent is far beyond its cell never turns again."""
    starts = torch.tensor([1.7, -0.7, 2.0, -1.0])
    plain, codes = descended("plain", starts, count=200, rate=0.02)
    assert torch.equal(plain, starts) and torch.equal(codes, starts >= 0.5)
    latents, codes = descended("biper", starts, count=200, rate=0.02)
    assert torch.equal(codes, starts < 0.5), "all turned as they were pulled"


@pytest.mark.parametrize("estimator", ["reste", "biper"])
def test_more_levels_have_the_plain_estimator(estimator: Estimator) -> None:
    latent = torch.linspace(-2, 6, 81)
    for question in (slope, nearest_codes):
        assert torch.equal(question(latent, 4, estimator), question(latent, 4))


def test_a_cast_keeps_every_gradient() -> None:
    master = torch.tensor([1 / 3, 1e9, -1e9], requires_grad=True)
    found = straight_cast(master, torch.float16, 0.25)
    assert found.tolist() == [float(torch.tensor(1 / 3).half()), 65504.0, 0.25]
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert master.grad.tolist() == [1, 2, 3]


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(RecipeError, match="scale'"):
        Relaxation(frozenset({"scale"}))
    with pytest.raises(RecipeError, match="estimator"):
        Relaxation(frozenset(), "none")
    with pytest.raises(RecipeError, match="power"):
        Relaxation(frozenset(), "reste", power=0.5)
    with pytest.raises(ValueError, match="target"):
        relax(Zero((2, 3)), ALL, torch.zeros(3, 2))


class Unheard:
    pass


def test_an_unknown_node_fails_loudly() -> None:
    with pytest.raises(TypeError, match="Unheard"):
        relax(Sum((Zero((1, 1)), Unheard())), ALL)
