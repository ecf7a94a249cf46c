"""Features, merge and truncation in factors, against the dense float64 computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_stf import core
from mergekit_stf.core import lowrank
from mergekit_stf.core.lowrank import (
    LowRank,
    factored_features,
    factored_svd,
    sum_of,
    superpose_factors,
    truncated,
)
from mergekit_stf.core.lowrank_report import report_of
from tests.oracle import superpose


def matrix(seed: int, m: int = 40, n: int = 28, r: int = 4, size: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, r, generator=generator, dtype=torch.float64) * size
    return LowRank(left, torch.randn(r, n, generator=generator, dtype=torch.float64))


def algorithm_1(matrices: list[Tensor], rank: int | None = None) -> Tensor:
    return torch.from_numpy(superpose([M.double().numpy() for M in matrices], rank))


def difference(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize(("m", "n", "r"), [(40, 28, 4), (28, 40, 4), (12, 9, 20), (9, 12, 20)])
def test_svd_of_factors_is_the_svd_of_their_product(m: int, n: int, r: int) -> None:
    low = matrix(0, m, n, r)
    U, s, Vh = factored_svd(low)
    expected = torch.linalg.svdvals(low.dense())
    assert torch.allclose(s, expected[: s.numel()], rtol=0, atol=1e-12 * float(expected[0]))
    assert difference(U * s @ Vh, low.dense()) < 1e-13
    identity = torch.eye(s.numel(), dtype=torch.float64)
    assert torch.allclose(U.T @ U, identity, atol=1e-12)
    assert torch.allclose(Vh @ Vh.T, identity, atol=1e-12)


def test_features_without_the_numerically_zero_ones() -> None:
    low = matrix(1)
    doubled = sum_of([low, low.scaled(2.0)])
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
    merged = superpose_factors(matrices).M
    assert merged.rank == 4 * tasks
    assert difference(merged.dense(), algorithm_1([low.dense() for low in matrices])) < 1e-6


def test_every_constraint_is_met() -> None:
    matrices = [matrix(seed) for seed in range(3)]
    M = superpose_factors(matrices).M.dense()
    for low in matrices:
        U, s, Vh = factored_svd(low)
        assert torch.allclose(((U.T @ M) * Vh).sum(1)[:4], s[:4], rtol=1e-6)


def test_whole_and_factored_matrices_mix() -> None:
    factored, whole = matrix(1), torch.randn(40, 28, generator=torch.Generator().manual_seed(2))
    merged = superpose_factors([factored, whole]).M
    assert difference(merged.dense(), algorithm_1([factored.dense(), whole])) < 1e-5


def test_rank_keeps_leading_features() -> None:
    matrices = [matrix(seed, r=8) for seed in range(2)]
    merged = superpose_factors(matrices, rank=3).M
    assert merged.rank == 6
    assert difference(merged.dense(), algorithm_1([low.dense() for low in matrices], 3)) < 1e-6


def test_ridge_is_added_to_the_diagonal() -> None:
    low = matrix(3)
    assert difference(superpose_factors([low], ridge=0.25).M.dense(), low.dense() / 1.25) < 1e-6


def test_only_zero_matrices_merge_to_zero() -> None:
    zero = LowRank(torch.zeros(5, 2), torch.randn(2, 4))
    merged = superpose_factors([zero, zero]).M
    assert merged.rank == 0
    assert torch.equal(merged.dense(), torch.zeros(5, 4, dtype=torch.float64))


def test_truncation_is_the_best_one_and_states_its_error() -> None:
    low = sum_of([matrix(seed) for seed in range(3)])
    short, dropped = truncated(low, 5)
    s = torch.linalg.svdvals(low.dense())
    assert short.rank == 5
    assert dropped == pytest.approx(float(torch.linalg.norm(s[5:])))
    assert float(torch.linalg.norm(low.dense() - short.dense())) == pytest.approx(dropped)


def test_parts_are_those_of_the_product() -> None:
    low, lines = matrix(4), torch.tensor([0, 3, 5])
    for index in ((lines,), (slice(None), lines)):
        part = low.part(index)
        assert torch.allclose(part.dense(), low.dense()[index])
        placed = torch.zeros(40, 28, dtype=torch.float64)
        placed[index] = low.dense()[index]
        assert torch.allclose(part.placed(index, low.shape).dense(), placed)


def test_report_is_that_of_the_whole_matrices() -> None:
    matrices = [matrix(0), LowRank(torch.zeros(40, 0), torch.zeros(0, 28)), matrix(2, size=3)]
    found = report_of(superpose_factors([low.scaled(1.0) for low in matrices]))
    expected = core.superpose([low.dense().double() for low in matrices]).report
    assert found.ranks == expected.ranks == (4, 0, 4)
    for name in ("shape", "norms", "merged_norm", "sum_norm", "energy", "alpha_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    for name in ("overlaps", "spectra"):
        pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
        assert all(a == pytest.approx(b, rel=1e-6, abs=1e-9) for a, b in pairs), name


def test_norm_and_transposition_do_not_need_the_product() -> None:
    low = matrix(4)
    assert low.norm == pytest.approx(float(torch.linalg.norm(low.dense())))
    torch.testing.assert_close(low.transposed.dense(), low.dense().T)
    other = matrix(5)
    assert low.inner(other) == pytest.approx(float((low.dense() * other.dense()).sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_sum_with_the_base_in_blocks_of_rows(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "BLOCK", block)
    low = matrix(5)
    base = torch.randn(40, 28, generator=torch.Generator().manual_seed(6)).to(dtype)
    total = torch.cat([block.clone() for block in low.added_to(base)])
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    exact = base.double() + low.dense()
    assert difference(total, exact) < 10 * torch.finfo(total.dtype).eps


def test_factorisation_and_lanczos_give_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [matrix(seed, r=6, size=1 + seed) for seed in range(3)]
    direct = superpose_factors(matrices)
    monkeypatch.setattr(lowrank, "DIRECT", 0)
    iterated = superpose_factors(matrices)
    assert difference(direct.M.dense(), iterated.M.dense()) < 1e-12
    assert direct.solution is not None
    assert iterated.solution is not None
    assert direct.solution.iterations == 0 < iterated.solution.iterations
    assert direct.solution.energy == pytest.approx(iterated.solution.energy)
    assert 1 <= direct.solution.condition <= 1.01 * iterated.solution.condition


def test_contradictions_are_left_to_the_general_solver() -> None:
    first = matrix(0)
    noisy = LowRank(first.left * 1.1, first.right + 1e-3 * matrix(1).right)
    merged = superpose_factors([first, noisy])
    assert merged.solution is not None
    assert merged.solution.cutoff > 0
    assert merged.M.norm < 3 * first.norm
