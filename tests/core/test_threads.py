"""Several decompositions at a time: in order, within memory, and the process left as it was."""

import threading
import weakref
from collections import Counter, deque
from contextlib import contextmanager, nullcontext

import pytest
import torch

from mergekit_stf.core import superpose, threads
from mergekit_stf.core.threads import over_tasks


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def matrices(count, n=8):
    return [torch.full((n, n), float(i)) for i in range(count)]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_results_come_in_order(count):
    assert list(over_tasks(lambda M: float(M[0, 0]), matrices(count))) == list(
        map(float, range(count))
    )
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_a_batch_shares_the_cores():
    together = threading.Barrier(2, timeout=60)

    def work(M):
        together.wait()
        return torch.get_num_threads()

    assert list(over_tasks(work, matrices(2))) == [2, 2]


@pytest.mark.usefixtures("four_threads")
def test_an_error_ends_the_batch_and_restores_the_cores():
    def work(M):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(over_tasks(work, matrices(3)))
    assert torch.get_num_threads() == 4
    assert list(over_tasks(torch.sum, matrices(2))) == [torch.tensor(0.0), torch.tensor(64.0)]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_matrices_are_taken_at_most_a_round_ahead(workers, monkeypatch):
    monkeypatch.setattr(threads, "WORKSPACE", (2 * workers - 1) * threads.SQUARES * 64)
    taken, done, ahead, at_once = [], [], [], []

    def source():
        for M in matrices(11):
            taken.append(M)
            yield M

    def work(M):
        ahead.append(len(taken) - len(done))
        at_once.append(torch.get_num_threads())
        done.append(M)
        return float(M[0, 0])

    assert over_tasks(work, source()) == list(map(float, range(11)))
    assert max(ahead) <= 2 * workers
    assert at_once[0] == 4 // workers


@pytest.mark.usefixtures("four_threads")
def test_a_worker_that_is_done_takes_the_next_matrix(monkeypatch):
    """The first matrix ends only when the fifth, of the third round, has been worked on."""
    fifth = threading.Event()

    def work(M):
        number = int(M[0, 0])
        if number == 4:
            fifth.set()
        return number or fifth.wait(60)

    monkeypatch.setattr(threads, "WORKSPACE", 3 * threads.SQUARES * 64)
    assert over_tasks(work, matrices(6)) == [True, 1, 2, 3, 4, 5]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("count", "last"), [(5, 5), (6, 6), (7, 7), (8, 4), (9, 5), (2, 2)])
def test_what_is_left_over_is_worked_on_together_with_the_last_round(count, last):
    """All of them wait for each other, which a round of four and then another could not do."""
    together = threading.Barrier(last, timeout=60)

    def work(M):
        if M[0, 0] >= count - last:
            together.wait()
        return torch.get_num_threads()

    assert over_tasks(work, matrices(count)) == [2 if count == 2 else 1] * count


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("room", "held"), [(1, 1), (3, 5)])
def test_a_matrix_that_has_been_worked_on_is_given_back(room, held, monkeypatch):
    """Two workers hold two each, and one that is done may not have given it back yet."""
    monkeypatch.setattr(threads, "WORKSPACE", room * threads.SQUARES * 64)
    alive, most = weakref.WeakSet(), []

    def source():
        for _ in range(8):
            M = torch.ones(8, 8)
            alive.add(M)
            yield M
            del M

    def work(M):
        most.append(len(alive))

    over_tasks(work, source())
    assert max(most) <= held


@pytest.mark.usefixtures("four_threads")
def test_an_error_of_the_source_waits_for_what_is_running():
    running, done = [], []

    def source():
        yield from matrices(6)
        raise ZeroDivisionError

    def work(M):
        running.append(M)
        done.append(M)

    with pytest.raises(ZeroDivisionError):
        over_tasks(work, source())
    assert len(running) == len(done) == 3
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_a_merge_inside_a_merge_waits_for_no_one():
    def work(M):
        return list(over_tasks(torch.sum, matrices(2)))[1]

    assert list(over_tasks(work, matrices(2))) == [torch.tensor(64.0)] * 2


@pytest.mark.usefixtures("four_threads")
def test_workers_record_no_gradients():
    found = over_tasks(lambda M: torch.is_grad_enabled(), matrices(4))
    assert not any(found)


@pytest.mark.usefixtures("four_threads")
def test_the_workspace_is_that_of_the_decompositions_at_a_time():
    cpu, one = torch.device("cpu"), threads.SQUARES * 64**2
    assert [threads.workspace(64, tasks, cpu) for tasks in (1, 3, 7, 100)] == [
        one,
        3 * one,
        7 * one,
        7 * one,
    ]
    card = torch.device("cuda")
    assert threads.workspace(64, 100, card) == threads.STREAMS * threads.CARD_SQUARES * 64**2
    assert threads.workspace(4096, 100, card) == threads.CARD_SQUARES * 4096**2
    assert threads.workspace(8192, 100, cpu) == threads.SQUARES * 8192**2
    assert threads.workspace(2048, 100, cpu) <= threads.WORKSPACE


class Card:
    """What torch calls of a card, noted down: there is none where these tests run."""

    def __init__(self, monkeypatch):
        self.notes, self.current = [], threading.local()
        self.caller = object()
        for name in ("Stream", "stream", "current_stream", "set_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        threads._card_pool.cache_clear()

    def Stream(self, device):  # noqa: N802
        made = type("Stream", (), {})()
        made.wait_stream = lambda other: self.note("waits", made, other)
        made.synchronize = lambda: self.note("ends", made, self.caller)
        return made

    @contextmanager
    def stream(self, stream):
        self.current.stream = stream
        yield
        del self.current.stream

    def current_stream(self, device):
        return self.caller

    def set_device(self, device):
        self.note("device", None, self.caller)

    def note(self, what, stream, other):
        assert other is self.caller
        self.notes.append((what, stream))

    def work(self, M):
        self.notes.append(("works", self.current.stream))
        return float(M[0, 0])

    def merge(self, work, source, rank=1.0):
        source = iter(source)
        return threads._on_streams(work, deque([next(source)]), source, rank)


@pytest.fixture
def card(monkeypatch):
    yield Card(monkeypatch)
    threads._card_pool.cache_clear()


def test_work_on_a_card_begins_after_the_callers_and_has_ended_when_it_returns(card):
    assert card.merge(card.work, matrices(9)) == list(map(float, range(9)))
    streams = {stream for what, stream in card.notes if what == "works"}
    assert 1 <= len(streams) <= threads.STREAMS
    for stream in streams:
        steps = [what for what, own in card.notes if own is stream]
        assert steps == ["waits", "works", "ends"] * (len(steps) // 3)


def test_a_card_works_on_as_many_matrices_as_streams_and_takes_one_ahead(card):
    together, taken, most = threading.Barrier(threads.STREAMS, timeout=60), [], []

    def source():
        for M in matrices(2 * threads.STREAMS):
            taken.append(M)
            yield M

    def work(M):
        most.append(len(taken))
        together.wait()
        return M

    assert len(card.merge(work, source())) == 2 * threads.STREAMS
    assert max(most[: threads.STREAMS]) <= threads.STREAMS + 1


def test_a_card_is_given_no_more_than_its_memory_holds(card, monkeypatch):
    monkeypatch.setattr(threads, "WORKSPACE", 2 * threads.CARD_SQUARES * 64)
    running, most = Counter(), []

    def work(M):
        running["now"] += 1
        most.append(running["now"])
        threading.Event().wait(0.02)
        running["now"] -= 1

    card.merge(work, matrices(8))
    assert max(most) == 2


@pytest.mark.parametrize(("rank", "streams"), [(1.0, 1), (8, 1), (0.5, 2), (4, 2)])
def test_few_features_need_less_memory_each(card, monkeypatch, rank, streams):
    monkeypatch.setattr(threads, "WORKSPACE", 2 * threads.LEADING_SQUARES * 64)
    used = set()

    def work(M):
        used.add(threading.current_thread())
        threading.Event().wait(0.02)

    card.merge(work, matrices(6), rank)
    assert len(used) == streams


@pytest.mark.parametrize("rank", [1.0, 0.25, 3])
def test_a_card_is_told_how_many_features_a_merge_keeps(monkeypatch, rank):
    class OnCard(torch.Tensor):
        is_cuda = True

    told = []

    def on_streams(work, taken, rest, rank):
        told.append(rank)
        return [work(M.as_subclass(torch.Tensor)) for M in (*taken, *rest)]

    monkeypatch.setattr(threads, "_on_streams", on_streams)
    superpose([torch.eye(8).as_subclass(OnCard)], rank=rank)
    assert told == [rank]


def test_an_error_on_a_stream_waits_for_it_and_gives_the_card_back(card):
    def work(M):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        card.merge(work, matrices(3))
    assert [what for what, _ in card.notes].count("ends") == 3
    assert card.merge(card.work, matrices(2)) == [0.0, 1.0]
    assert card.notes[-1][0] == "ends"


def test_linear_algebra_is_loaded_before_the_threads_of_a_card(card, monkeypatch):
    """Torch loads it at the first use, which fails where two threads do so at a time."""
    callers = []
    original = torch.linalg.cholesky_ex

    def seen(*args, **kwargs):
        callers.append(threading.current_thread())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", seen)
    card.merge(card.work, matrices(2))
    assert callers == [threading.current_thread()]


@pytest.mark.parametrize(("side", "held"), [(512, False), (4096, True)])
def test_large_exact_decompositions_of_a_card_have_it_alone(side, held):
    class OnCard:
        is_cuda = True
        shape = (2 * side, side)

    with threads.alone(OnCard()):
        assert threads._large.locked() is held
    assert not threads._large.locked()
    OnCard.is_cuda = False
    assert isinstance(threads.alone(OnCard()), nullcontext)
