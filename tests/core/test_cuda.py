"""The engine on a card; skipped where there is none."""

import pytest
import torch

from mergekit_stf.core import decompose, superpose, trim
from mergekit_stf.core.features.decompose import ROUTES
from tests.core.cases import distance, expected, with_close_runs, with_equal_lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def matrices(shape, tasks, density=1.0):
    generator = torch.Generator().manual_seed(0)
    return [trim(torch.randn(shape, generator=generator), density) for _ in range(tasks)]


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("shape", [(256, 256), (512, 200), (200, 512)])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_every_route_equals_the_oracle(route, shape, density):
    inputs = matrices(shape, 3, density)
    result = superpose([M.cuda() for M in inputs], route=route).M
    assert result.is_cuda
    error = distance(result, expected(inputs))
    assert error <= {"svd": 1e-3, "gram_float32": 1e-3, "gram_refined": 2e-5}.get(route, 1e-5)


@pytest.mark.parametrize("gap", [1e-6, 3e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(320, 256), (256, 256), (400, 400)])
@pytest.mark.parametrize("first", [0, 3, 6])
def test_close_features_are_told_apart_without_float64(gap, shape, first):
    inputs = [with_close_runs(first + i, gap, shape) for i in range(3)]
    M = superpose([M.cuda() for M in inputs], route="gram_refined").M
    assert distance(M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("side", [200, 700])
@pytest.mark.parametrize("spread", [0, 1e-6, 1e-4, 1e-2])
def test_equal_singular_values_give_the_matrix_back(side, spread):
    M = with_equal_lengths(side, spread)
    found = decompose(M.cuda(), route="gram_refined")
    assert found.rank == side
    back = found.U * found.s @ found.Vh
    assert float((back.cpu() - M).norm() / M.norm()) <= 1e-5
    assert float((found.Vh @ found.Vh.mT).cpu().sub(torch.eye(side)).abs().max()) <= 1e-5


def test_many_tasks_equal_the_oracle():
    inputs = matrices((96, 80), 24)
    assert distance(superpose([M.cuda() for M in inputs]).M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("tasks", [4, 16])
@pytest.mark.parametrize("rank", [1.0, 0.1])
def test_same_bytes_again(tasks, rank):
    """Decompositions run on several streams at a time, each of which must know its order."""
    inputs = [M.cuda() for M in matrices((700, 600), tasks)]
    first = superpose(inputs, rank=rank).M
    assert all(torch.equal(superpose(inputs, rank=rank).M, first) for _ in range(4))


def test_streams_give_what_one_gives(monkeypatch):
    inputs = [M.cuda() for M in matrices((700, 600), 3)]
    together = superpose(inputs).M
    monkeypatch.setattr("mergekit_stf.core.pool.STREAMS", 1)
    assert torch.equal(superpose(inputs).M, together)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_trimming_keeps_the_same_entries_as_the_cpu(density):
    x = torch.randn(700, 500, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert torch.equal(trim(x.cuda(), density).cpu(), trim(x, density))
