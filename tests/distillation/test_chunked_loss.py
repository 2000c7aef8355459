"""The chunked head: the same losses and gradients as with whole logits, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmcompress.distillation.objective.chunked_loss import HeadLoss, Term, chunked_loss
from llmcompress.distillation.teacher.predictions import Online
from llmcompress.errors import InputError
from llmcompress.losses.loss import LossConfig, Predictions, measure
from llmcompress.losses.taid import TAID
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear
from tests.builders import compressed
from tests.losses.cases import config, every_loss
from tests.losses.spy import largest_tensor

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def several() -> list[Term]:
    """Losses of which no two have the same gradient, count or weight."""
    taid = TAID()
    state = taid.start()
    state.update(3.0, 0.1)
    state.update(2.0, 0.3)
    return [(config("forward_kl"), None, 1.0), (config("dad", gamma=1.0), None, 0.3), (taid, state, -0.7)]


@dataclass(frozen=True)
class Models:
    """The ends of two models: hidden states, heads, and what is to be predicted."""

    hidden: Tensor
    head: nn.Linear
    teacher_hidden: Tensor
    teacher_head: nn.Linear
    targets: Tensor

    def chunked(self, terms: Sequence[Term], chunk: int | None = None) -> HeadLoss:
        """By chunks."""
        return chunked_loss(
            self.hidden, self.head, Online(self.teacher_hidden, self.teacher_head), self.targets, terms, chunk=chunk
        )

    def whole(self, terms: Sequence[Term]) -> HeadLoss:
        """With all logits at once."""
        predictions = Predictions(self.head(self.hidden), self.teacher_head(self.teacher_hidden).detach(), self.targets)
        pairs = [measure(predictions, config, state) for config, state, _ in terms]
        total = sum(weight * pair[0] for (*_, weight), pair in zip(terms, pairs))
        return HeadLoss(total, tuple((loss.detach(), count) for loss, count in pairs))

    def gradients(self, loss: HeadLoss, scale: float = 1.0) -> tuple[Tensor, ...]:
        """Of the total, times `scale`, with respect to the hidden states and the head's parameters."""
        return torch.autograd.grad(scale * loss.total, [self.hidden, *self.head.parameters()])


def models(
    tokens: int = 13, vocabulary: int = 11, width: int = 5, dtype: torch.dtype = torch.float64, bias: bool = False
) -> Models:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    heads = []
    for n in (width, width + 2):
        head = nn.Linear(n, vocabulary, bias=bias, dtype=dtype)
        for parameter in head.parameters():
            parameter.data = normal(*parameter.shape)
        heads.append(head)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return Models(normal(tokens, width).requires_grad_(), heads[0], normal(tokens, width + 2), heads[1], targets)


def assert_same(given: Models, found: HeadLoss, expected: HeadLoss) -> None:
    assert_close(found.total.detach(), expected.total.detach(), **EXACT)
    for (loss, count), (loss_expected, count_expected) in zip(found.terms, expected.terms, strict=True):
        assert_close(loss, loss_expected, **EXACT)
        assert_close(count, count_expected, **EXACT)
    for gradient, wanted in zip(given.gradients(found, 2.5), given.gradients(expected, 2.5), strict=True):
        assert_close(gradient, wanted, **EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 14, 1000, None])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_nothing(chunk: int | None, bias: bool) -> None:
    given = models(bias=bias)
    assert_same(given, given.chunked(several(), chunk), given.whole(several()))


@every_loss
def test_every_loss_can_be_chunked(config: LossConfig) -> None:
    given = models()
    terms: list[Term] = [(config, config.start(), 0.5)]
    assert_same(given, given.chunked(terms, 4), given.whole(terms))


def test_no_token_is_nothing() -> None:
    given = models(tokens=0)
    loss = given.chunked(several(), 4)
    assert float(loss.total.detach()) == 0 and all(float(n) == float(s) == 0 for s, n in loss.terms)
    assert all(not gradient.any() for gradient in given.gradients(loss))


def test_weights_may_divide_by_counts_of_the_whole_step() -> None:
    """Two micro-batches of unequal size, one optimizer step: each weight is 1 / the step's count."""
    given = models()
    parts = [slice(0, 4), slice(4, 13)]

    def of(part: slice, terms: Sequence[Term]) -> HeadLoss:
        return chunked_loss(
            given.hidden[part],
            given.head,
            Online(given.teacher_hidden[part], given.teacher_head),
            given.targets[part],
            terms,
            chunk=3,
        )

    with torch.no_grad():
        counts = [sum(pair[1] for pair in term) for term in zip(*(of(part, several()).terms for part in parts))]
    terms = [(config, state, weight / float(n)) for (config, state, weight), n in zip(several(), counts)]
    accumulated = [sum(each) for each in zip(*(given.gradients(of(part, terms)) for part in parts))]
    whole_counts = [count for _, count in given.whole(several()).terms]
    divided = [(config, state, weight / float(n)) for (config, state, weight), n in zip(several(), whole_counts)]
    expected = given.gradients(given.whole(divided))
    for found, wanted in zip(accumulated, expected, strict=True):
        assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("trained", ["hidden", "head", "nothing"])
def test_only_what_trains_has_a_gradient(trained: str) -> None:
    given = models()
    expected = given.gradients(given.whole(several()))
    given.hidden.requires_grad_(trained == "hidden")
    given.head.requires_grad_(trained == "head")
    loss = given.chunked(several(), 4)
    assert loss.total.requires_grad == (trained != "nothing")
    if trained == "nothing":
        return
    loss.total.backward()
    assert (given.hidden.grad is None) == (trained != "hidden")
    assert (given.head.weight.grad is None) == (trained != "head")
    assert_close(*((given.hidden.grad, expected[0]) if trained == "hidden" else (given.head.weight.grad, expected[1])))
    assert given.teacher_head.weight.grad is None


def test_nothing_is_differentiated_under_no_grad() -> None:
    given = models()
    with torch.no_grad():
        loss = given.chunked(several(), 4)
    assert not loss.total.requires_grad
    assert_close(loss.total, given.whole(several()).total.detach(), **EXACT)


def test_heads_may_be_tensors_or_functions() -> None:
    given = models()
    expected = given.gradients(given.whole(several()))
    weight, teacher_weight = given.head.weight, given.teacher_head.weight
    rest = (Online(given.teacher_hidden, teacher_weight), given.targets, several())
    by_tensor = chunked_loss(given.hidden, weight, *rest, chunk=4)
    by_function = chunked_loss(given.hidden, lambda h: h @ weight.T, *rest, chunk=4, parameters=[weight])
    for loss in (by_tensor, by_function):
        for found, wanted in zip(given.gradients(loss), expected, strict=True):
            assert_close(found, wanted, **EXACT)


def test_a_head_may_scale_and_bend_its_logits() -> None:
    given = models()

    class Capped(nn.Module):
        """A head with a temperature that trains and a soft limit."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = given.head
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, hidden: Tensor) -> Tensor:
            """Logits within 3 of zero."""
            return 3 * torch.tanh(self.inner(hidden) * self.scale / 3)

    capped = Models(given.hidden, Capped(), given.teacher_hidden, given.teacher_head, given.targets)
    assert_same(capped, capped.chunked(several(), 4), capped.whole(several()))


def test_a_head_may_be_compressed() -> None:
    given = models(width=16, dtype=torch.float32)
    approx = compressed(given.head.weight.detach(), given.hidden.detach(), {"method": "rtn", "bits": 4}).expression()
    head = CompressedLinear.of(approx)
    dense_head = nn.Linear(16, 11, bias=False)
    dense_head.weight = nn.Parameter(dense(approx).float(), requires_grad=False)
    expected = replace(given, head=dense_head).whole(several()).total
    found = replace(given, head=head).chunked(several(), 4).total
    assert_close(*(torch.autograd.grad(total, [given.hidden])[0] for total in (found, expected)))
    assert_close(found, expected)


def test_tied_embeddings_get_both_gradients() -> None:
    given = models()
    ids = torch.arange(11)

    def gradient(chunked: bool) -> Tensor:
        hidden = nn.functional.embedding(ids, given.head.weight).tanh()
        tied = Models(hidden, given.head, given.teacher_hidden[:11], given.teacher_head, given.targets[:11])
        loss = tied.chunked(several(), 4) if chunked else tied.whole(several())
        return torch.autograd.grad(loss.total, [given.head.weight])[0]

    assert_close(gradient(True), gradient(False), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, error", [(torch.bfloat16, 0.02), pytest.param(torch.float16, 0.003, marks=pytest.mark.slow)]
)
def test_half_precision_sums_in_float32(dtype: torch.dtype, error: float) -> None:
    half = models(tokens=2000, dtype=dtype)
    double = models(tokens=2000)
    double.hidden.data, double.head.weight.data = half.hidden.data.double(), half.head.weight.data.double()
    double.teacher_head.weight.data, double.teacher_hidden[:] = (
        half.teacher_head.weight.data.double(),
        half.teacher_hidden,
    )
    loss = half.chunked(several(), 1)  # 2000 gradients of the head are added up
    assert loss.total.dtype == torch.float32
    for found, wanted in zip(half.gradients(loss), double.gradients(double.whole(several())), strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < error * wanted.norm()


@pytest.mark.parametrize("shared", [False, True])
def test_autocast_loses_no_gradient(shared: bool) -> None:
    """Its cache of cast weights must not hold one that was cast without grad, for a teacher with the same head."""
    given = models(tokens=300, dtype=torch.float32)
    if shared:
        given = replace(given, teacher_hidden=given.teacher_hidden[:, :5], teacher_head=given.head)
    expected = given.gradients(given.whole(several()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = given.chunked(several(), 64)
    for found, wanted in zip(given.gradients(loss), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("vocabulary", [64, 1000])
def test_memory_does_not_grow_with_the_text(vocabulary: int) -> None:
    def size(tokens: int, chunk: int) -> int:
        given = models(tokens=tokens, vocabulary=vocabulary, dtype=torch.float32)
        return largest_tensor(lambda: given.gradients(given.chunked(several(), chunk)))

    sizes = {size(tokens, 32) for tokens in (32, 64, 96, 128)}
    assert sizes == {32 * vocabulary * 4}, "the logits of one chunk are the largest tensor"
    assert size(128, 128) == 128 * vocabulary * 4


def test_the_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.distillation.objective.chunked_loss.LOGITS_ON_CPU", 50)
    given, rows = models(), []

    def head(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return given.teacher_head(hidden)

    chunked_loss(given.hidden, given.head, Online(given.teacher_hidden, head), given.targets, several())
    assert rows == [1, 4, 4, 4, 1]  # once to see the vocabulary of 11


def test_impossible_chunked_loss_is_refused() -> None:
    given, other = models(), models(vocabulary=12)
    rest = (Online(given.teacher_hidden, other.teacher_head), given.targets)
    with pytest.raises(InputError, match="the student has a vocabulary of 11 tokens, its teacher one of 12"):
        chunked_loss(given.hidden, given.head, *rest, several())
    with pytest.raises(ValueError, match="chunk is 0"):
        given.chunked(several(), 0)
    with pytest.raises(ValueError, match="0 losses of 13 student rows"):
        given.chunked([])
    with pytest.raises(ValueError, match="3 losses of 12 student rows, 13 teacher rows"):
        teacher = Online(given.teacher_hidden, given.teacher_head)
        chunked_loss(given.hidden[1:], given.head, teacher, given.targets, several())
