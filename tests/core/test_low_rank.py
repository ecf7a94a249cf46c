"""Features, merge and truncation in factors, against the dense float64 computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_stf import core
from mergekit_stf.core import Features, LowRank, TaskMatrices, solve
from mergekit_stf.core.low_rank import sum_of
from mergekit_stf.core.solve.gram import Blocks
from tests.oracle import superpose


def matrix(seed: int, m: int = 40, n: int = 28, r: int = 4, size: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, r, generator=generator, dtype=torch.float64) * size
    return LowRank(left, torch.randn(r, n, generator=generator, dtype=torch.float64))


def algorithm_1(matrices: list[Tensor], rank: int | None = None) -> Tensor:
    return torch.from_numpy(superpose([M.double().numpy() for M in matrices], rank))


def factored_features(low: LowRank) -> Features:
    (found,) = TaskMatrices.of([low]).features()
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize(("m", "n", "r"), [(40, 28, 4), (28, 40, 4), (12, 9, 20), (9, 12, 20)])
def test_svd_of_factors_is_the_svd_of_their_product(m: int, n: int, r: int) -> None:
    low = matrix(0, m, n, r)
    U, s, Vh = low.svd()
    expected = torch.linalg.svdvals(low.dense())
    assert torch.allclose(s, expected[: s.numel()], rtol=0, atol=1e-12 * float(expected[0]))
    assert difference(U * s @ Vh, low.dense()) < 1e-13
    identity = torch.eye(s.numel(), dtype=torch.float64)
    assert torch.allclose(U.T @ U, identity, atol=1e-12)
    assert torch.allclose(Vh @ Vh.T, identity, atol=1e-12)


def test_features_without_the_numerically_zero_ones() -> None:
    low = matrix(1)
    doubled = sum_of([low, low.times(2.0)])
    features = factored_features(doubled)
    assert doubled.rank == 8
    assert features.rank == 4
    assert difference(features.U * features.s @ features.Vh, 3 * low.dense()) < 1e-13


def test_zero_factors_have_no_features() -> None:
    zero = LowRank(torch.zeros(5, 2), torch.randn(2, 4))
    assert factored_features(zero).rank == 0


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_superposition_in_factors_is_algorithm_1(tasks: int) -> None:
    matrices = [matrix(seed, size=1 + seed) for seed in range(tasks)]
    merged = core.superpose(matrices).M
    assert merged.rank == 4 * tasks
    assert difference(merged.dense(), algorithm_1([low.dense() for low in matrices])) < 1e-6


def test_every_constraint_is_met() -> None:
    matrices = [matrix(seed) for seed in range(3)]
    M = core.superpose(matrices).M.dense()
    for low in matrices:
        U, s, Vh = low.svd()
        assert torch.allclose(((U.T @ M) * Vh).sum(1)[:4], s[:4], rtol=1e-6)


def test_rank_keeps_leading_features() -> None:
    matrices = [matrix(seed, r=8) for seed in range(2)]
    merged = core.superpose(matrices, rank=3).M
    assert merged.rank == 6
    assert difference(merged.dense(), algorithm_1([low.dense() for low in matrices], 3)) < 1e-6


def test_ridge_is_added_to_the_diagonal() -> None:
    low = matrix(3)
    assert difference(core.superpose([low], ridge=0.25).M.dense(), low.dense() / 1.25) < 1e-6


def test_only_zero_matrices_merge_to_zero() -> None:
    zero = LowRank(torch.zeros(5, 2), torch.randn(2, 4))
    merged = core.superpose([zero, zero]).M
    assert merged.rank == 0
    assert torch.equal(merged.dense(), torch.zeros(5, 4, dtype=torch.float64))


def test_norm_and_transposition_do_not_need_the_product() -> None:
    low = matrix(4)
    assert low.norm == pytest.approx(float(torch.linalg.norm(low.dense())))
    torch.testing.assert_close(low.transposed.dense(), low.dense().T)
    other = matrix(5)
    assert low.inner(other) == pytest.approx(float((low.dense() * other.dense()).sum()))


def test_whole_and_factored_matrices_mix() -> None:
    factored, whole = matrix(1), torch.randn(40, 28, generator=torch.Generator().manual_seed(2))
    merged = core.superpose([factored, whole]).M
    assert isinstance(merged, Tensor)
    assert difference(merged, algorithm_1([factored.dense(), whole])) < 1e-5


def test_record_is_that_of_the_whole_matrices() -> None:
    matrices = [matrix(0), LowRank(torch.zeros(40, 0), torch.zeros(0, 28)), matrix(2, size=3)]
    found = core.superpose(matrices).record
    expected = core.superpose([low.dense().double() for low in matrices]).record
    assert found.kept == expected.kept == (4, 0, 4)
    for name in ("norms", "norm_merged", "norm_sum", "energy", "alpha_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    for name in ("cosine", "spectra"):
        pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
        assert all(a == pytest.approx(b, rel=1e-6, abs=1e-9) for a, b in pairs), name


def test_factorisation_and_lanczos_give_one_answer() -> None:
    features = [factored_features(matrix(seed, r=6, size=1 + seed)) for seed in range(3)]
    direct, iterated = solve(features), solve(features, operator=Blocks(features))
    torch.testing.assert_close(direct.alpha, iterated.alpha, rtol=1e-11, atol=1e-12)
    assert direct.iterations == 0 < iterated.iterations
    assert direct.energy == pytest.approx(iterated.energy)
    assert 1 <= direct.condition <= 1.01 * iterated.condition


def test_contradictions_are_left_to_the_general_solver() -> None:
    first = matrix(0)
    noisy = LowRank(first.left * 1.1, first.right + 1e-3 * matrix(1).right)
    merged = core.superpose([first, noisy])
    assert merged.record.cutoff
    assert isinstance(merged.M, LowRank)
    assert merged.M.norm < 3 * first.norm
