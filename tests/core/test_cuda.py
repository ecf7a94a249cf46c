"""The engine on a card; skipped where there is none."""

import numpy as np
import pytest
import torch

from mergekit_stf.core import superpose, trim
from mergekit_stf.core.routes import ROUTES
from tests import oracle

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
    expected = oracle.superpose([M.double().numpy() for M in inputs])
    result = superpose([M.cuda() for M in inputs], route=route).M
    assert result.is_cuda
    error = np.linalg.norm(result.double().cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error <= (1e-4 if route in ("svd", "gram_float32", "gram_refined") else 1e-5)


def test_many_tasks_equal_the_oracle():
    inputs = matrices((96, 80), 24)
    expected = oracle.superpose([M.double().numpy() for M in inputs])
    result = superpose([M.cuda() for M in inputs]).M
    error = np.linalg.norm(result.double().cpu().numpy() - expected) / np.linalg.norm(expected)
    assert error <= 1e-5


@pytest.mark.parametrize("tasks", [4, 16])
def test_same_bytes_again(tasks):
    inputs = [M.cuda() for M in matrices((300, 200), tasks)]
    assert torch.equal(superpose(inputs).M, superpose(inputs).M)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.9])
def test_trimming_keeps_the_same_entries_as_the_cpu(density):
    x = torch.randn(700, 500, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert torch.equal(trim(x.cuda(), density).cpu(), trim(x, density))
