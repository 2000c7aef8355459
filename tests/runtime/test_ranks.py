"""Agreement of processes, by threads that take turns; and a process that is alone."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import typer

from llmcompress.cli.terminal import Terminal
from llmcompress.errors import EndedError, InputError, NumericsError, RecipeError
from llmcompress.runtime import ranks
from llmcompress.runtime.ranks import ALONE, Ranks, _own_device, join_ranks
from tests.distillation.launched import free_port
from tests.lockstep import in_lockstep

COUNTS = [2, 3, 5]


@pytest.mark.parametrize("count", COUNTS)
def test_gather_items_keeps_their_order(count: int) -> None:
    items = torch.arange(14).reshape(7, 2)
    found = in_lockstep(count, lambda ranks: ranks.gather_items([row.sum() for row in ranks.share(items)]))
    assert found == [[int(row.sum()) for row in items]] * count


def test_what_is_on_the_host_stays_there() -> None:
    """Tokens of calibration are hashed there; devices of other processes are this one's."""
    here = Ranks("meta", 1, 2)
    assert here._unpack(ranks._pack({"ids": torch.ones(2)}))["ids"].device.type == "cpu"
    assert here._unpack(ranks._pack(torch.ones(2, device="meta"))).device.type == "meta"


@pytest.mark.parametrize("count", COUNTS)
def test_add_gives_the_same_bits_in_each_process(count: int) -> None:
    given = [torch.randn(5, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(count)]

    def work(ranks: Ranks) -> torch.Tensor:
        own = given[ranks.rank].clone()
        ranks.add(own)
        return own

    found = in_lockstep(count, work)
    torch.testing.assert_close(found[0].double(), torch.stack(given).double().sum(0), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found[0], other) for other in found)


def test_first_broadcasts_its_result() -> None:
    called: list[int] = []

    def work(ranks: Ranks) -> int:
        return ranks.first(lambda: called.append(ranks.rank) or 7)

    assert in_lockstep(3, work) == [7] * 3 and called == [0]


@pytest.mark.parametrize("failing", [{0}, {1}, {1, 2}, {0, 1, 2}])
def test_an_error_is_raised_in_all_processes_and_reported_once(failing: set[int]) -> None:
    met: list[tuple[int, bool]] = []

    def work(ranks: Ranks) -> None:
        try:
            with ranks.agree_on_errors():
                if ranks.rank in failing:
                    raise NumericsError(f"found by {ranks.rank}")
        except NumericsError as error:
            assert str(error) == f"found by {min(failing)}"
            met.append((ranks.rank, error.reported_elsewhere))

    in_lockstep(3, work)
    assert sorted(met) == [(0, False), (1, True), (2, True)]


def test_an_error_in_first_is_raised_in_all_processes() -> None:
    def work(ranks: Ranks) -> None:
        def find() -> None:
            raise InputError("the model is damaged")

        with pytest.raises(InputError, match="the model is damaged"):
            ranks.first(find)

    in_lockstep(2, work)


def test_compare_names_the_differences() -> None:
    def work(ranks: Ranks) -> None:
        ranks.compare({"recipe": {"bits": 3}, "versions": 1})
        given = {"recipe": {"bits": 3 + (ranks.rank == 1)}, "versions": ranks.rank, "device": "cpu"}
        with pytest.raises(RecipeError, match="process 1 of 3 was started with other recipe, versions than process 0"):
            ranks.compare(given)

    in_lockstep(3, work)


def test_a_single_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("init_process_group", "rendezvous", "all_gather_object", "all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, lambda *given, **named: pytest.fail("a group was asked for"))
    value = torch.ones(2)
    with join_ranks("cpu") as ranks:
        assert ranks == ALONE
        assert ranks.gather(value)[0] is value and ranks.first(lambda: value) is value
        ranks.add(value)
        ranks.compare({"anything": object()})
        with pytest.raises(EndedError), ranks.agree_on_errors():
            raise EndedError("as it came")
    assert torch.equal(value, torch.ones(2)) and ranks.requested_device == "cpu"


def test_missing_launcher_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ranks.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        join_ranks("cpu").__enter__()


@pytest.mark.slow
def test_join_ranks_refuses_missing_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GATHERING", timedelta(seconds=1))
    own = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="not all of the 2 processes came within 1 seconds; every process that"):
        join_ranks("cpu").__enter__()
    assert not torch.distributed.is_initialized()


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "kind_of", lambda name, count: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (_own_device("cuda", 2), _own_device("cpu", 2)) == ("cuda:1", "cpu")
    assert Ranks("cuda:1", 1, 2).requested_device == "cuda" and Ranks("cuda:1").requested_device == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RecipeError, match="process 2 of this machine has no cuda device, of which torch finds 2"):
        _own_device("cuda", 3)


def test_an_error_reported_elsewhere_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for told, said in ((False, "[5] the model is damaged\n"), (True, "")):
        error = InputError("the model is damaged")
        error.reported_elsewhere = told
        with pytest.raises(typer.Exit) as ended, Terminal():
            raise error
        assert ended.value.exit_code == 5 and capsys.readouterr().err == said
