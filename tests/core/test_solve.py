"""Systems that are singular or nearly so, both forms of G, and the ridge."""

import math
import sys
from itertools import pairwise

import pytest
import torch

from mergekit_stf.core import decompose, solve, superpose
from mergekit_stf.core.features import combine
from mergekit_stf.core.solve.gram import Blocks, Products, Whole, blocks_size, choose_gram
from mergekit_stf.core.solve.lanczos import choose_cutoff, filter_inverse
from mergekit_stf.core.tolerances import CUTOFF, ILL_POSED, WELL_POSED

NOISE = torch.logspace(-8, -1, 9).tolist()
SIZES = [64, 160, 512]


def draw(seed, n, m=None):
    shape = (m or n, n)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(features):
    U = torch.cat([f.U for f in features], dim=1).double()
    V = torch.cat([f.Vh for f in features]).double().mT
    return (U.mT @ U) * (V.mT @ V)


def length(M):
    return float(M.norm())


@pytest.mark.parametrize("form", [Whole, Blocks, Products])
def test_every_form_applies_the_gram_matrix(form):
    features = [decompose(draw(i, 40, 60), rank=r) for i, r in enumerate((1.0, 0.5, 7))]
    alpha = torch.randn(67, generator=torch.Generator().manual_seed(9)).double()
    torch.testing.assert_close(
        form(features).apply(alpha), dense(features) @ alpha, rtol=1e-5, atol=1e-5
    )


def test_few_tasks_take_blocks_and_many_take_products(monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "ROOM", 0)
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    few = [decompose(draw(i, 40)) for i in range(3)]
    many = [decompose(draw(i, 40)) for i in range(40)]
    assert isinstance(choose_gram(few), Blocks)
    assert isinstance(choose_gram(many), Products)


@pytest.mark.parametrize(("tasks", "blocks"), [(2, True), (3, True), (4, False)])
def test_blocks_take_as_much_room_as_the_task_matrices(monkeypatch, tasks, blocks):
    """Those of T square tasks have T(T-1)/2 times the entries of one, task matrices T times."""
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "ROOM", 0)
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    features = [decompose(draw(i, 40)) for i in range(tasks)]
    assert isinstance(choose_gram(features), Blocks) is blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_and_some_more(monkeypatch, dtype):
    features = [decompose(draw(i, 40).to(dtype)) for i in range(6)]
    size = 40 * 40 * dtype.itemsize
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "ROOM", 9 * size)
    assert isinstance(choose_gram(features), Blocks)
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "ROOM", 9 * size - 1)
    assert isinstance(choose_gram(features), Products)


@pytest.mark.parametrize("tasks", [1, 3, 9, 40])
def test_the_size_of_the_blocks_is_foretold(tasks, monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    operator = choose_gram([decompose(draw(i, 40, 32)) for i in range(tasks)])
    blocks = getattr(operator, "blocks", [])
    assert blocks_size(40, 32, tasks) == sum(block.nbytes for _, _, block in blocks)
    assert bool(blocks) is (tasks in (3, 9))


def test_memory_of_the_solve_is_linear_in_the_number_of_tasks(monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "ROOM", 0)
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    sizes = {}
    for tasks in (4, 32, 64):
        operator = choose_gram([decompose(draw(i, 32)) for i in range(tasks)])
        blocks = getattr(operator, "blocks", [])
        sizes[tasks] = sum(block.numel() for _, _, block in blocks)
    assert all(size <= tasks * 32 * 32 * 2 for tasks, size in sizes.items())


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_a_numeric_ridge_is_added_to_the_diagonal(ridge):
    features = [decompose(draw(i, 30, 50)) for i in range(3)]
    s = torch.cat([f.s for f in features]).double()
    expected = torch.linalg.solve(dense(features) + ridge * torch.eye(90).double(), s)
    solution = solve(features, ridge)
    torch.testing.assert_close(solution.alpha, expected, rtol=1e-4, atol=1e-5)
    assert solution.ridge == ridge
    assert solution.converged


def test_the_condition_is_the_one_of_the_gram_matrix(monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.gram"], "FEW", 0)
    features = [decompose(draw(i, 30, 50)) for i in range(4)]
    values = torch.linalg.eigvalsh(dense(features))
    assert solve(features).condition == pytest.approx(float(values[-1] / values[0]), rel=0.3)
    assert solve(features).condition <= float(values[-1] / values[0]) * 1.01


def test_a_solve_that_does_not_converge_is_said(monkeypatch):
    monkeypatch.setattr(sys.modules["mergekit_stf.core.solve.lanczos"], "MAX_ITERATIONS", 2)
    with pytest.warns(RuntimeWarning, match=r"o_proj: the solve stopped .* `ridge"):
        superpose([draw(i, 80) for i in range(4)], name="o_proj")


def companions(n):
    A, N = draw(1, n), draw(2, n)
    named = {"A": A, "2A": 2 * A, "-A": -A, "mixed": 0.9 * A + 0.1 * N}
    named |= {f"noise {e:.0e}": 1.1 * A + e * N for e in NOISE}
    return A, named


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("third", [False, True])
def test_near_duplicates_never_blow_up(n, third):
    A, named = companions(n)
    extra = [draw(3, n)] if third else []
    for name, B in named.items():
        bound = 1.2 * (length(A) + length(B) + sum(map(length, extra)))
        assert length(superpose([A, B, *extra]).M) <= bound, name


@pytest.mark.parametrize("n", SIZES)
def test_a_duplicate_counts_once(n):
    A, named = companions(n)
    for name, factor in (("A", 1.0), ("2A", 1.5), ("-A", 0.0)):
        M = superpose([A, named[name]]).M
        assert length(M - factor * A) <= 1e-3 * length(A), name
    for e in NOISE[:4]:
        M = superpose([A, named[f"noise {e:.0e}"]]).M
        assert length(M - 1.05 * A) <= 1e-3 * length(A), e


@pytest.mark.parametrize("n", SIZES)
def test_a_duplicate_beside_another_task_counts_once(n):
    A, C = draw(1, n), draw(3, n)
    expected = superpose([A, C]).M
    assert length(superpose([A, C, A]).M - expected) <= 1e-3 * length(expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("third", [False, True])
def test_the_answer_is_continuous_in_the_noise(n, third):
    """``|M' - M| <= 2 sqrt(n) |B' - B|``: singular vectors of a dense spectrum turn by about
    ``sqrt(n)`` times the relative change of the matrix, and no answer can turn less."""
    A, N = draw(1, n), draw(2, n)
    extra = [draw(3, n)] if third else []
    previous = None
    for e in [0.0, *NOISE]:
        B = 1.1 * A + e * N
        M = superpose([A, B, *extra]).M
        if previous is not None:
            bound = 2 * math.sqrt(n) * length(B - previous[0]) + 1e-5 * length(A)
            assert length(M - previous[1]) <= bound, e
        previous = B, M


def test_the_cut_off_is_continuous_and_rises():
    energies = torch.linspace(0, 6, 2001).tolist()
    cutoffs = [choose_cutoff(energy) for energy in energies]
    assert choose_cutoff(WELL_POSED) == 0
    assert choose_cutoff(ILL_POSED) == CUTOFF
    assert cutoffs == sorted(cutoffs)
    assert max(b - a for a, b in pairwise(cutoffs)) < 2e-3


def test_the_damped_inverse_is_exact_above_the_cut_off():
    x = torch.tensor([1.0, 2.0, 64.0], dtype=torch.float64)
    torch.testing.assert_close(filter_inverse(x, CUTOFF), 1 / x, rtol=1e-12, atol=0)
    small = torch.tensor([0.0, 1e-12, 1e-3], dtype=torch.float64)
    assert float(filter_inverse(small, CUTOFF).abs().max()) < 1e-6


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_well_posed_systems_are_not_damped(n, tasks):
    record = superpose([draw(i, n) for i in range(tasks)]).record
    assert record.cutoff == 0
    assert record.energy <= WELL_POSED


def test_combine_is_the_sum_of_rank_one_features():
    features = [decompose(draw(i, 12, 20)) for i in range(2)]
    M = combine(features, [f.s for f in features])
    torch.testing.assert_close(M, draw(0, 12, 20) + draw(1, 12, 20), rtol=1e-5, atol=1e-5)
