"""Several decompositions at a time: in order, within memory, and the process left as it was."""

import threading
import weakref

import pytest
import torch

from mergekit_stf.core import threads
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
