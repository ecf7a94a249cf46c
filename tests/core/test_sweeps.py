"""Gauss-Seidel sweeps over many tasks, against dense algebra and the Lanczos process."""

import sys
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import decompose, solve, superpose
from mergekit_stf.core.features import Features
from mergekit_stf.core.gram import Products, combine, gram
from mergekit_stf.core.routes import ROUTES
from mergekit_stf.core.solve import Lanczos
from mergekit_stf.core.sweeps import FEWEST, swept, worthwhile
from mergekit_stf.core.tolerances import WELL_POSED
from tests import oracle

MANY = 16


def draw(seed, m=64, n=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


def many(count=MANY, m=72, n=64, dtype=torch.float32, rank=1.0):
    return [decompose(draw(seed, m, n, dtype), rank) for seed in range(count)]


def dense(features):
    U = torch.cat([f.U for f in features], dim=1).double()
    V = torch.cat([f.Vh for f in features]).double().mT
    return (U.mT @ U) * (V.mT @ V)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_it_is_the_solution_of_the_system(dtype, limit):
    features = many(dtype=dtype)
    s = torch.cat([f.s for f in features]).double()
    expected = torch.linalg.solve(dense(features), s)
    found = swept(features)
    assert float((found.alpha - expected).norm() / expected.norm()) <= limit
    assert found.energy == pytest.approx(float(s @ expected / (s @ s)), rel=10 * limit)


def test_the_residual_is_the_one_of_the_system():
    features = many()
    s = torch.cat([f.s for f in features]).double()
    found = swept(features)
    residual = float((dense(features) @ found.alpha - s).norm() / s.norm())
    assert found.residual <= 1e-6
    assert abs(found.residual - residual) <= 5e-7


def test_the_matrix_belongs_to_the_weights():
    features = many(rank=9)
    found = swept(features)
    M = combine(features, torch.split(found.alpha, [f.rank for f in features]))
    torch.testing.assert_close(found.M, M, rtol=1e-5, atol=1e-5)


def test_tasks_of_different_rank():
    features = [decompose(draw(seed), rank=3 + seed) for seed in range(MANY)]
    s = torch.cat([f.s for f in features]).double()
    expected = torch.linalg.solve(dense(features), s)
    assert float((swept(features).alpha - expected).norm() / expected.norm()) <= 2e-6


def test_it_takes_fewer_passes_than_the_lanczos_process():
    features = many(24, 192, 160)
    passes = solve(features, operator=Products(features)).iterations
    assert swept(features).sweeps + 1 <= 0.75 * passes


@pytest.mark.parametrize("tasks", [12, 18, 24])
def test_the_rate_is_the_one_of_features_in_general_position(tasks):
    """The root of ``ln λ = c (1 - 1/λ)`` other than 1, by iteration of ``1/λ = 1 - ln(λ) / c``."""
    c = tasks / 96
    inverse = 1 / c**2
    for _ in range(60):
        inverse = 1 + log(inverse) / c
    sweeps = swept(many(tasks, 96, 96, torch.float64)).sweeps
    assert sweeps == pytest.approx(log(1e14) / log(inverse**0.5), abs=1.5)


@pytest.mark.parametrize("first", [0, 24, 48])
def test_many_tasks_are_swept_and_agree_with_the_oracle(first):
    matrices = [draw(first + i, 96, 80) for i in range(24)]
    found = superpose(matrices)
    expected = torch.from_numpy(oracle.superpose([M.double().numpy() for M in matrices]))
    assert float((found.M.double() - expected).norm() / expected.norm()) <= 1e-5
    assert found.report.iterations < 20
    features = [decompose(M) for M in matrices]
    alike = solve(features, operator=gram(features))
    torch.testing.assert_close(found.M, combine(features, alike.alpha), rtol=1e-4, atol=1e-5)


def test_the_condition_is_a_lower_bound():
    features = many()
    values = torch.linalg.eigvalsh(dense(features))
    condition = swept(features).condition
    assert 1.5 <= condition <= 1.01 * float(values[-1] / values[0])


def test_equal_tasks_count_once():
    A = decompose(draw(0))
    found = swept([A] * MANY)
    torch.testing.assert_close(found.M, draw(0), rtol=1e-4, atol=1e-5)
    assert found.energy == pytest.approx(1 / MANY, rel=1e-4)


def test_an_ill_posed_system_is_left_to_the_lanczos_process():
    A, N = draw(1), draw(2)
    matrices = [A, 1.1 * A + 1e-3 * N, *(draw(seed) for seed in range(3, MANY + 1))]
    features = [decompose(M) for M in matrices]
    assert worthwhile(features)
    assert swept(features) is None
    found, expected = solve(features), solve(features, operator=gram(features))
    assert found.cutoff == expected.cutoff > 0
    assert found.energy > WELL_POSED
    torch.testing.assert_close(found.alpha, expected.alpha)


def test_a_contradiction_that_sweeps_would_solve_is_damped_all_the_same(monkeypatch):
    """Two long features, nearly parallel, that ask for 1000 and 300."""
    first, second = torch.eye(72)[:, :1], torch.eye(72)[:, 1:2]
    tilted, v = 0.9 * first + (1 - 0.9**2) ** 0.5 * second, torch.eye(64)[:1]
    features = [
        *many(),
        Features(first, torch.tensor([1000.0]), v, "svd"),
        Features(tilted, torch.tensor([300.0]), v, "svd"),
    ]
    assert worthwhile(features)
    assert swept(features) is None
    assert solve(features).cutoff > 0
    monkeypatch.setattr("mergekit_stf.core.sweeps.WELL_POSED", 10.0)
    assert swept(features).energy > WELL_POSED


def test_what_does_not_converge_is_left_to_the_lanczos_process(monkeypatch):
    features = many()
    monkeypatch.setattr("mergekit_stf.core.sweeps.VERIFIED", {torch.float32: 0.0})
    assert swept(features) is None
    steps = []
    step = Lanczos.step
    monkeypatch.setattr(Lanczos, "step", lambda self: steps.append(1) or step(self))
    assert solve(features).converged
    assert steps


def test_a_ridge_is_no_matter_of_sweeps(monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve"], "swept", None)
    assert solve(many(), ridge=0.1).ridge == 0.1


def test_few_tasks_take_the_blocks():
    assert not worthwhile(many(FEWEST - 1))
    assert worthwhile(many(MANY))
    tall = [decompose(draw(seed, 400, 20)) for seed in range(FEWEST)]
    assert not worthwhile(tall)


def test_sweeps_end_where_there_is_no_room_for_their_corrections(monkeypatch):
    """Five sweeps are needed; a correction is of the size of a task matrix."""
    features = many(5, 96, 96)
    needed = swept(features).sweeps
    size = 96 * 96 * 4
    monkeypatch.setattr(sys.modules["mergekit_stf.core.gram"], "ROOM", (needed - 5) * size)
    assert swept(features).sweeps == needed
    monkeypatch.setattr(sys.modules["mergekit_stf.core.gram"], "ROOM", (needed - 5) * size - 1)
    assert swept(features) is None
    assert solve(features).converged


@settings(max_examples=15, deadline=None)
@given(
    m=st.integers(24, 60),
    n=st.integers(24, 60),
    rank=st.integers(2, 8),
    tasks=st.integers(FEWEST, 20),
    seed=st.integers(0, 2**20),
)
def test_every_constraint_is_met_by_the_shortest_matrix(m, n, rank, tasks, seed):
    features = [decompose(draw(seed + i, m, n, torch.float64), rank) for i in range(tasks)]
    found = swept(features)
    if found is None:
        assert solve(features).energy > WELL_POSED
        return
    for f in features:
        responses = (f.U.mT @ found.M * f.Vh).sum(dim=1)
        assert float((responses - f.s).abs().max()) <= 1e-10 * float(f.s[0])
    s = torch.cat([f.s for f in features])
    assert float(found.M.square().sum()) == pytest.approx(float(s @ found.alpha), rel=1e-10)


@pytest.fixture
def swept_only(monkeypatch):
    """Fail where the Lanczos process would step in."""
    monkeypatch.setattr(Lanczos, "step", None)


def apart(M, expected):
    return float((M - expected).norm() / expected.norm())


@pytest.mark.usefixtures("swept_only")
@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_laws_of_many_tasks(route):
    """Order, scale, transposition and a duplicate, which counts once."""
    limit = 2e-5 if route in ("auto", "gram_float64") else 2e-3
    matrices = [draw(seed, 72, 64) for seed in range(MANY)]
    M = superpose(matrices, route=route).M
    assert apart(superpose(matrices[::-1], route=route).M, M) <= limit
    assert apart(superpose([3 * A for A in matrices], route=route).M, 3 * M) <= limit
    assert apart(superpose([A.mT for A in matrices], route=route).M.mT, M) <= limit
    assert apart(superpose([*matrices, matrices[3]], route=route).M, M) <= limit


@pytest.mark.usefixtures("swept_only")
@pytest.mark.parametrize("exponent", [-110, -60, -31, 31, 64, 110])
def test_powers_of_two_change_no_digit(exponent):
    matrices = [draw(seed, 72, 64) for seed in range(MANY)]
    M = superpose([2.0**exponent * A for A in matrices]).M
    assert torch.equal(M, 2.0**exponent * superpose(matrices).M)


@pytest.mark.usefixtures("swept_only")
def test_the_same_bytes_again():
    matrices = [draw(seed, 72, 64) for seed in range(MANY)]
    assert torch.equal(superpose(matrices).M, superpose(matrices).M)
