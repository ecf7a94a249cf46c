"""TSV-M and Iso-C against their oracles, and the laws that they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, TaskMatrices, methods
from tests.core.cases import distance
from tests.subspace_oracles import iso_c, tsv_m

ORACLES = {"tsv_m": tsv_m, "iso_c": iso_c}
SIDES = st.integers(4, 40)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=25, deadline=None)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(seed, shape, count=3):
    s = (1 + torch.arange(min(shape)) / 8) ** -1.0
    return [
        draw(seed + i, shape[0], min(shape)) * s @ draw(seed + 50 + i, min(shape), shape[1])
        for i in range(count)
    ]


def merged(method, matrices):
    return methods.get(method).merge(TaskMatrices.of(matrices), {})


def close(M, other, scale, tolerance=1e-3):
    return float((M.double() - other.double()).norm()) <= tolerance * float(scale.double().norm())


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (300, 256), (1, 9), (9, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equals_the_oracle(method, shape, count):
    matrices = decaying(3, shape, count)
    wanted = ORACLES[method]([M.double().numpy() for M in matrices])
    assert distance(merged(method, matrices).M, wanted) <= 1e-5


@pytest.mark.parametrize("method", ORACLES)
def test_factors_stay_factors(method):
    factors = [LowRank(draw(i, 40, 3).double(), draw(9 + i, 3, 28).double()) for i in range(3)]
    M = merged(method, factors).M
    assert isinstance(M, LowRank)
    wanted = ORACLES[method]([low.dense().numpy() for low in factors])
    assert distance(M.dense(), wanted) <= 1e-9


@pytest.mark.parametrize("method", ORACLES)
def test_zeros_give_zeros(method):
    assert not merged(method, [torch.zeros(5, 4)] * 2).M.any()


@pytest.mark.parametrize("method", ORACLES)
def test_the_record_is_of_the_whole_matrices_lengths(method):
    matrices = decaying(4, (40, 30))
    record = merged(method, matrices).record
    assert record.norm_merged == pytest.approx(float(merged(method, matrices).M.norm()), rel=1e-5)
    cosine = float((matrices[0] * matrices[1]).sum() / matrices[0].norm() / matrices[1].norm())
    assert record.cosine[0][1] == pytest.approx(cosine, abs=1e-5)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-90, 90))
def test_scaling_and_transposition_commute(m, n, seed, exponent):
    matrices = decaying(seed % 10**6, (m, n), 2)
    for method in ORACLES:
        M = merged(method, matrices).M.double()
        scaled = merged(method, [A * 2.0**exponent for A in matrices]).M.double()
        assert close(scaled * 2.0**-exponent, M, M)
        assert close(merged(method, [A.mT.contiguous() for A in matrices]).M.mT, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_iso_c_of_a_task_and_its_negation_is_nothing_and_one_value_is_left(m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    assert close(merged("iso_c", [A, -A]).M, 0 * A, A)
    s = torch.linalg.svdvals(merged("iso_c", [A, B]).M.double())
    assert float(s.max() - s.min()) <= 1e-4 * float(s.max())


@LAW
@given(seed=SEEDS, half=st.integers(2, 12))
def test_tsv_m_adds_what_the_leading_features_of_orthogonal_tasks_are(seed, half):
    """Two tasks of half the rank in orthogonal spaces are kept as they are."""
    A, B = torch.zeros(2 * half, 2 * half), torch.zeros(2 * half, 2 * half)
    A[:half, :half], B[half:, half:] = draw(seed, half, half), draw(seed + 1, half, half)
    assert close(merged("tsv_m", [A, B]).M, A + B, A + B)
