"""Several decompositions at a time: in order, within memory, and the process left as it was."""

import threading
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from mergekit_stf.core import TaskMatrices, pool
from mergekit_stf.core.pool import map_matrices, workers_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def matrices(count, n=8):
    return [torch.full((n, n), float(i)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(count, workers):
    found = map_matrices(lambda M: float(M[0, 0]), matrices(count), workers, CPU)
    assert found == list(map(float, range(count)))
    assert torch.get_num_threads() == 4


def test_workers_share_the_cores():
    together = threading.Barrier(2, timeout=60)

    def work(M):
        together.wait()
        return torch.get_num_threads()

    assert map_matrices(work, matrices(2), 2, CPU) == [2, 2]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_matrices_are_taken_when_a_worker_is_free_and_given_back(workers):
    alive, most = weakref.WeakSet(), []

    def source():
        for _ in range(9):
            M = torch.ones(8, 8)
            alive.add(M)
            yield M
            del M

    def work(M):
        most.append(len(alive))

    map_matrices(work, source(), workers, CPU)
    assert max(most) <= workers + 1  # the thread of a finished one may not have let go of it yet


def test_an_error_waits_for_what_is_running_and_restores_the_cores():
    done = []

    def source():
        yield from matrices(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        map_matrices(done.append, source(), 4, CPU)
    assert len(done) == 3
    assert torch.get_num_threads() == 4
    with pytest.raises(RuntimeError, match="broken"):
        map_matrices(lambda M: M.broken(), [type("M", (), {"broken": broken})()], 2, CPU)
    assert map_matrices(torch.sum, matrices(2), 2, CPU) == [torch.tensor(0.0), torch.tensor(64.0)]


def broken(self):
    raise RuntimeError("broken")


def test_work_within_work_waits_for_no_one():
    def work(M):
        return map_matrices(torch.sum, matrices(2), 2, CPU)[1]

    assert map_matrices(work, matrices(2), 2, CPU) == [torch.tensor(64.0)] * 2


def test_workers_record_no_gradients():
    assert not any(map_matrices(lambda M: torch.is_grad_enabled(), matrices(4), 2, CPU))


def test_there_are_as_many_workers_as_cores_and_memory_allow(monkeypatch):
    assert workers_for(64, 3, CPU) == 3
    assert workers_for(64, 100, CPU) == 5
    monkeypatch.setattr(pool, "WORKSPACE", 2 * pool.SQUARES["cpu"] * 64**2)
    assert workers_for(64, 100, CPU) == 2
    assert workers_for(640, 100, CPU) == 1
    torch.set_num_threads(1)
    assert workers_for(8, 100, CPU) == 1


def test_a_card_has_as_many_as_streams_and_memory_allow():
    card = torch.device("cuda")
    assert workers_for(64, 100, card) == pool.STREAMS
    assert workers_for(4096, 100, card) == 1
    assert workers_for(4096, 100, card, leading=True) == 2
    assert pool.workspace(4096, 100, card) == pool.SQUARES["cuda"] * 4096**2
    assert pool.workspace(2048, 100, CPU) <= pool.WORKSPACE


def test_task_matrices_are_decomposed_by_several_workers():
    seen = []

    def read():
        for M in matrices(3):
            seen.append(torch.get_num_threads())
            yield M + torch.eye(8)

    tasks = TaskMatrices(read, (8, 8), 3, CPU)
    assert [f.rank for f in tasks.features()] == [8, 8, 8]
    assert seen == [1, 1, 1]  # the cores were shared out among three workers
    assert tasks.features() is tasks.features()


class Card:
    """What torch calls of a card, noted down: there is none where these tests run."""

    def __init__(self, monkeypatch):
        self.notes, self.current = [], threading.local()
        self.caller = object()
        for name in ("Stream", "stream", "current_stream", "set_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        original = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *shape, device=None: original(*shape))

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

    def each(self, work, source, workers=pool.STREAMS):
        return map_matrices(work, source, workers, torch.device("cuda", 0))


@pytest.fixture
def card(monkeypatch):
    pool._streams.cache_clear()
    yield Card(monkeypatch)
    pool._streams.cache_clear()


def test_work_on_a_card_begins_after_the_callers_and_has_ended_when_it_returns(card):
    assert card.each(card.work, matrices(9)) == list(map(float, range(9)))
    streams = {stream for what, stream in card.notes if what == "works"}
    assert 1 <= len(streams) <= pool.STREAMS
    for stream in streams:
        steps = [what for what, own in card.notes if own is stream]
        assert steps == ["waits", "works", "ends"] * (len(steps) // 3)


def test_an_error_on_a_stream_waits_for_it_and_gives_the_card_back(card):
    def work(M):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        card.each(work, matrices(3))
    assert [what for what, _ in card.notes].count("ends") == 3
    assert card.each(card.work, matrices(2)) == [0.0, 1.0]
    assert card.notes[-1][0] == "ends"


def test_linear_algebra_is_loaded_before_the_threads_of_a_card(card, monkeypatch):
    """Torch loads it at the first use, which fails where two threads do so at a time."""
    callers = []
    original = torch.linalg.cholesky_ex

    def seen(*args, **kwargs):
        callers.append(threading.current_thread())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", seen)
    card.each(card.work, matrices(2))
    assert callers == [threading.current_thread()]


@pytest.mark.parametrize(("side", "held"), [(512, False), (4096, True)])
def test_large_exact_decompositions_of_a_card_have_it_alone(side, held):
    class OnCard:
        is_cuda = True
        shape = (2 * side, side)
        device = torch.device("cuda", 0)

    with pool.lock_if_large(OnCard()):
        assert pool._large.locked() is held
    assert not pool._large.locked()
    OnCard.is_cuda = False
    assert isinstance(pool.lock_if_large(OnCard()), nullcontext)
