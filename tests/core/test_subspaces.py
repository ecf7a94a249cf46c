"""TSV-M, Iso-C, Iso-CTS and KnOTS against their oracles, and the laws that they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, TaskMatrices, methods
from tests.core.cases import distance
from tests.subspace_oracles import iso_c, iso_cts, knots, tsv_m

ORACLES = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": iso_cts, "knots": knots}
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


def merged(name, matrices, input_axis=1, **options):
    method = methods.get(name)
    given = {option.name: option.default for option in method.options} | options
    return method.merge(TaskMatrices.of(matrices, input_axis=input_axis), given)


def close(M, other, scale, tolerance=1e-3):
    return float((M.double() - other.double()).norm()) <= tolerance * float(scale.double().norm())


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (300, 256), (1, 9), (9, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equals_the_oracle(method, shape, count):
    matrices = decaying(3, shape, count)
    wanted = ORACLES[method]([M.double().numpy() for M in matrices])
    assert distance(merged(method, matrices).M, wanted) <= 1e-5


OPTIONS = {"iso_cts": [{"common": 0.0}, {"common": 0.55}, {"common": 1.0}],
           "knots": [{"keep": 0.2}, {"keep": 0.7}]}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"), [(name, given) for name, all_ in OPTIONS.items() for given in all_]
)
@pytest.mark.parametrize("shape", [(64, 48), (30, 40)])
@pytest.mark.parametrize("input_axis", [0, 1])
def test_equals_the_oracle_with_options(method, options, shape, input_axis):
    matrices = decaying(5, shape)
    plain = [M.double().numpy() for M in matrices]
    wanted = ORACLES[method](plain, input_axis=input_axis, **options)
    assert distance(merged(method, matrices, input_axis, **options).M, wanted) <= 1e-5


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("input_axis", [0, 1])
@pytest.mark.parametrize("rank", [3, 9])
def test_factors_stay_factors(method, input_axis, rank):
    """With rank 9 the adapters have more directions than ``iso_cts`` takes as common ones."""
    factors = [
        LowRank(draw(i, 40, rank).double(), draw(9 + i, rank, 28).double()) for i in range(3)
    ]
    M = merged(method, factors, input_axis).M
    assert isinstance(M, LowRank)
    plain = [low.dense().numpy() for low in factors]
    assert distance(M.dense(), ORACLES[method](plain, input_axis=input_axis)) <= 1e-9


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
        turned = merged(method, [A.mT.contiguous() for A in matrices], input_axis=0).M.mT
        assert method == "iso_cts" or close(turned, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_tasks_does_not_matter(m, n, seed, order):
    matrices = decaying(seed % 10**6, (m, n), 3)
    for method in ORACLES:
        M = merged(method, matrices).M
        assert close(merged(method, [matrices[i] for i in order]).M, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, common=st.floats(0, 1))
def test_iso_cts_of_one_task_is_iso_c(m, n, seed, common):
    (A,) = decaying(seed % 10**6, (m, n), 1)
    wanted = merged("iso_c", [A]).M
    assert close(merged("iso_cts", [A], common=common).M, wanted, wanted)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_iso_cts_has_every_direction_once(m, n, seed):
    s = torch.linalg.svdvals(merged("iso_cts", decaying(seed % 10**6, (m, n), 3)).M.double())
    assert float(s.max() - s.min()) <= 1e-3 * float(s.max())


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(1, 4))
def test_knots_of_equal_tasks_is_the_task_and_of_a_negation_nothing(m, n, seed, times):
    A = draw(seed, m, n)
    assert close(merged("knots", [A] * times).M, A, A, 1e-5)
    assert close(merged("knots", [A, -A] * times).M, 0 * A, A, 1e-5)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_knots_of_tasks_with_outputs_of_their_own_is_their_sum(m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    A[m // 2 :], B[: m // 2] = 0, 0
    assert close(merged("knots", [A, B]).M, A + B, A + B, 1e-5)
    low = [LowRank(torch.eye(m)[:, : m // 2], A[: m // 2]),
           LowRank(torch.eye(m)[:, m // 2 :], B[m // 2 :])]  # fmt: skip
    assert close(merged("knots", low).M.dense(), A + B, A + B, 1e-5)


def test_knots_keeps_the_sign_of_the_sum_and_the_mean_of_those_that_have_it():
    """In a basis of one output there is nothing but TIES of a row."""
    rows = [
        torch.tensor([[4.0, -1, 2]]),
        torch.tensor([[2.0, 3, -1]]),
        torch.tensor([[-1.0, 3, -1]]),
    ]
    assert torch.allclose(merged("knots", rows).M.abs(), torch.tensor([[3.0, 3, 0]]))


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
