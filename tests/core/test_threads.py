"""Several decompositions at a time: in order, within memory, and the process left as it was."""

import threading

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
def test_large_matrices_come_one_at_a_time(monkeypatch):
    monkeypatch.setattr(threads, "WORKSPACE", 2 * threads.SQUARES * 64)
    taken = []

    def source():
        for M in matrices(5):
            taken.append(float(M[0, 0]))
            yield M

    found = over_tasks(lambda M: len(taken), source())
    assert list(found) == [2, 2, 4, 4, 5]


@pytest.mark.usefixtures("four_threads")
def test_a_merge_inside_a_merge_waits_for_no_one():
    def work(M):
        return list(over_tasks(torch.sum, matrices(2)))[1]

    assert list(over_tasks(work, matrices(2))) == [torch.tensor(64.0)] * 2


@pytest.mark.usefixtures("four_threads")
def test_workers_record_no_gradients():
    found = over_tasks(lambda M: torch.is_grad_enabled(), matrices(4))
    assert not any(found)
