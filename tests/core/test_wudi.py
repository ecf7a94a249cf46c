"""The closed form of WUDI against its oracle, and the laws that it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, STFError, TaskMatrices
from mergekit_stf.core.methods.wudi import PRIORS, Wudi
from tests.core.cases import distance
from tests.wudi_oracle import swudi, wudi

SIDES = st.integers(2, 40)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=25, deadline=None)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tasks_of(seed, shape, count=3, decay=1.0):
    """Task matrices with a decaying spectrum of inputs, of different lengths."""
    falling = (1 + torch.arange(shape[1]) / 8) ** -decay
    return [(1 + i) * draw(seed + i, *shape) * falling for i in range(count)]


def merged(matrices, input_axis=1, **options):
    given = {option.name: option.default for option in Wudi.options} | options
    return Wudi().merge(TaskMatrices.of(matrices, input_axis=input_axis), given)


def expected(matrices, **options):
    return wudi([M.double().numpy() for M in matrices], **options)


def close(M, other, scale, tolerance=2e-5):
    return float((M.double() - other.double()).norm()) <= tolerance * float(scale.double().norm())


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (300, 256), (20, 200), (1, 9), (9, 1)])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("ridge", [0.03, 0.3, 3.0])
def test_equals_the_oracle(shape, prior, ridge):
    matrices = tasks_of(1, shape)
    options = {"ridge": ridge, "prior": prior}
    assert distance(merged(matrices, **options).M, expected(matrices, **options)) <= 1e-5


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_equals_the_oracle_for_any_number_of_tasks_and_steep_spectra(count, decay):
    matrices = tasks_of(5, (96, 80), count, decay)
    assert distance(merged(matrices).M, expected(matrices)) <= 1e-5


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)])
def test_the_inputs_may_be_the_rows(shape):
    matrices = tasks_of(2, shape)
    found = merged([M.mT.contiguous() for M in matrices], input_axis=0).M
    assert distance(found.mT, expected(matrices)) <= 1e-5
    assert distance(merged(matrices, input_axis=0).M, expected(matrices, input_axis=0)) <= 1e-5


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("input_axis", [0, 1])
def test_factors_stay_factors(prior, input_axis):
    factors = [
        LowRank((1 + i) * draw(i, 40, 3).double(), draw(9 + i, 3, 28).double()) for i in range(3)
    ]
    factors.append(LowRank(torch.zeros(40, 0).double(), torch.zeros(0, 28).double()))
    M = merged(factors, input_axis, prior=prior).M
    assert isinstance(M, LowRank)
    assert M.rank == 9
    dense = expected([low.dense() for low in factors], prior=prior, input_axis=input_axis)
    assert distance(M.dense(), dense) <= 1e-10


def test_zeros_are_no_tasks():
    a, b = tasks_of(3, (30, 20), 2)
    zero = torch.zeros(30, 20)
    assert distance(merged([a, zero, b]).M, expected([a, b])) <= 1e-5
    assert not merged([zero, zero]).M.any()


def test_the_record_tells_lengths_and_overlaps():
    matrices = tasks_of(4, (40, 30))
    record = merged(matrices).record
    np.testing.assert_allclose(record.norms, [float(M.norm()) for M in matrices], rtol=1e-5)
    np.testing.assert_allclose(record.norm_sum, float(sum(matrices).norm()), rtol=1e-5)
    np.testing.assert_allclose(record.norm_merged, float(merged(matrices).M.norm()), rtol=1e-5)
    assert record.ridge == 0.3


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_one_task_gives_itself(m, n, seed):
    A = draw(seed, m, n)
    assert close(merged([A]).M, A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(2, 4))
def test_a_duplicate_counts_once(m, n, seed, times):
    A = draw(seed, m, n)
    assert close(merged([A] * times).M, A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_negation_give_nothing(m, n, seed):
    A = draw(seed, m, n)
    assert close(merged([A, -A]).M, 0 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_orthogonal_inputs_and_outputs_add_up(m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    A[m // 2 :], A[:, n // 2 :], B[: m // 2], B[:, : n // 2] = 0, 0, 0, 0
    assert close(merged([A, B]).M, A + B, A + B)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-110, 110))
def test_scaling_commutes(m, n, seed, exponent):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = merged([A, B]).M.double() * 2.0**exponent
    assert close(merged([A * 2.0**exponent, B * 2.0**exponent]).M, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_tasks_does_not_matter(m, n, seed, order):
    inputs = [draw(seed + i, m, n) for i in range(3)]
    M = merged(inputs).M
    assert close(merged([inputs[i] for i in order]).M, M, M)


def lineage(A, N, noise):
    return (1.1 * A + noise * N, -A + noise * N, 3 * A + noise * N)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, noise=st.floats(1e-6, 1.0), ridge=st.floats(0.01, 3.0))
def test_no_answer_is_further_from_the_prior_than_the_tasks_allow(m, n, seed, noise, ridge):
    """``|M - P|² <= Σ |P - M_i|² / μ`` with ``μ = ridge T / n``."""
    A, N = draw(seed, m, n), draw(seed + 1, m, n)
    for B in lineage(A, N, noise):
        S, squares = A + B, float(A.square().sum() + B.square().sum())
        P = min(1.0, squares / max(1e-30, float(S.square().sum()))) * S
        apart = float((merged([A, B], ridge=ridge).M - P).square().sum())
        allowed = sum(float((P - M).square().sum()) for M in (A, B)) * n / (2 * ridge)
        assert apart <= allowed * (1 + 1e-4) + 1e-8 * squares


@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("noise", [1e-6, 1e-4, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("prior", PRIORS)
def test_models_of_one_lineage_never_blow_up(n, noise, prior):
    A, N = draw(1, n, n), draw(2, n, n)
    for B in lineage(A, N, noise):
        for ridge in (0.03, 0.3):
            found = float(merged([A, B], ridge=ridge, prior=prior).M.norm())
            assert found <= 1.2 * float(A.norm() + B.norm())


@pytest.mark.parametrize(("name", "value"), [
    ("ridge", -1), ("ridge", "many"), ("ridge", True), ("ridge", float("nan")),
    ("weighting", "square"), ("inputs", 0), ("inputs", 2), ("flow", 0), ("flow", "fast"),
    ("leading", 0), ("calibrate", -1), ("calibrate", "yes"),
])  # fmt: skip
def test_options_refuse_what_they_do_not_know(name, value):
    (option,) = [option for option in Wudi.options if option.name == name]
    with pytest.raises((ValueError, STFError)):
        option.parse(value)


RELATIVES = {
    "actmat": {"ridge": 0.0, "prior": "none", "weighting": "equal"},
    "tact": {"ridge": 0.0, "prior": "none", "weighting": "equal", "inputs": 0.5},
    "nearest to the sum": {"ridge": 0.0, "prior": "sum"},
    "equal weights with a ridge": {"weighting": "equal"},
    "trimmed inputs with a ridge": {"inputs": 0.3},
}


@pytest.mark.parametrize("options", RELATIVES.values(), ids=RELATIVES)
@pytest.mark.parametrize("shape", [(64, 48), (30, 64), (9, 1), (1, 9)])
@pytest.mark.parametrize("input_axis", [0, 1])
def test_relatives_equal_their_oracles(options, shape, input_axis):
    matrices = tasks_of(6, shape, 2)
    wanted = expected(matrices, input_axis=input_axis, **options)
    assert distance(merged(matrices, input_axis, **options).M, wanted) <= 1e-5


def test_actmat_is_the_formula_of_its_paper():
    matrices = tasks_of(6, (40, 30))
    C = [M.double().mT @ M.double() for M in matrices]
    products = [M.double() @ c for M, c in zip(matrices, C, strict=True)]
    wanted = sum(products) @ torch.linalg.pinv(sum(C), rtol=1e-12)
    assert distance(merged(matrices, **RELATIVES["actmat"]).M, wanted.numpy()) <= 1e-5


@pytest.mark.parametrize("shape", [(64, 48), (30, 64)])
@pytest.mark.parametrize(("flow", "leading"), [(3.0, 1.0), (300.0, 0.85), (300.0, 0.2)])
def test_the_flow_of_swudi_is_gradient_flow(shape, flow, leading):
    matrices = tasks_of(7, shape)
    options = {"ridge": 0.0, "prior": "sum", "flow": flow, "leading": leading}
    wanted = swudi([M.double().numpy() for M in matrices], flow, leading)
    assert distance(merged(matrices, **options).M, wanted) <= 1e-5


def test_a_flow_with_a_ridge_ends_at_the_closed_form():
    matrices = tasks_of(8, (40, 30))
    assert distance(merged(matrices, flow=1e9).M, expected(matrices)) <= 1e-5
    stopped = merged(matrices, flow=20.0).M
    assert distance(stopped, expected(matrices)) > 1e-3


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"weighting": "equal"}, {"leading": 5.0},
                                     {"ridge": 0.0, "flow": 30.0}, {"flow": 30.0}])  # fmt: skip
@pytest.mark.parametrize("input_axis", [0, 1])
def test_relatives_stay_in_factors(options, input_axis):
    factors = [LowRank((1 + i) * draw(i, 40, 3), draw(9 + i, 3, 28)) for i in range(3)]
    factors += factors[:1]
    M = merged(factors, input_axis, **options).M
    assert isinstance(M, LowRank)
    whole = [low.left.double() @ low.right.double() for low in factors]
    assert distance(M.dense(), merged(whole, input_axis, **options).M.numpy()) <= 1e-8


def test_trimmed_inputs_of_adapters_are_refused():
    factors = [LowRank(draw(i, 40, 3), draw(9 + i, 3, 28)) for i in range(2)]
    with pytest.raises(STFError, match="leave it at 1"):
        merged(factors, inputs=0.5)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-110, 110))
def test_without_a_ridge_duplicates_count_once_and_scaling_commutes(m, n, seed, exponent):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    both = merged([A, B], ridge=0.0).M
    scaled = merged([A * 2.0**exponent, B * 2.0**exponent], ridge=0.0).M
    assert close(scaled.double() * 2.0**-exponent, both, both)
    assert close(merged([A, A, A], ridge=0.0).M, A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_without_a_ridge_the_prior_does_not_matter(m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    A[:, n // 2 :] = B[:, n // 2 :] = 0
    M = merged([A, B], ridge=0.0, prior="none").M
    assert not M[:, n // 2 :].any()
    for prior in PRIORS:
        assert close(merged([A, B], ridge=0.0, prior=prior).M, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_time_does_not_depend_on_the_order_of_tasks(m, n, seed):
    matrices = tasks_of(seed % 10**6, (m, n), 2)
    M = merged(matrices, weighting="equal", flow=3.0).M
    assert close(merged(matrices[::-1], weighting="equal", flow=3.0).M, M, M)
