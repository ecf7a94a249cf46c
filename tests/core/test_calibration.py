"""Singular value calibration against its oracle, and the laws that it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, TaskMatrices, methods
from mergekit_stf.core.calibration import calibrate
from mergekit_stf.core.methods.method import Merged
from mergekit_stf.core.methods.options import CALIBRATE
from mergekit_stf.core.record import Record
from tests import subspace_oracles
from tests.core.cases import distance, spectrum

SIDES = st.integers(2, 32)
SEEDS = st.integers(0, 2**20)
LAW = settings(max_examples=25, deadline=None)
SPECTRAL = [name for name in methods.names() if CALIBRATE in methods.get(name).options]


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def falling(seed, shape, count=3):
    """Task matrices with well separated singular values, and a part that all share."""
    s = 0.9 ** torch.arange(min(shape)).double()
    tasks = [spectrum(*shape, s, seed + i) if shape[0] >= shape[1] else
             spectrum(*shape[::-1], s, seed + i).mT for i in range(count)]  # fmt: skip
    return [M + tasks[0] / 2 for M in tasks]


def of_sum(matrices, alpha=1.0, input_axis=1):
    tasks = TaskMatrices.of(matrices, input_axis=input_axis)
    return calibrate(Merged(tasks.total(), Record()), tasks, alpha)


def run(name, matrices, alpha, input_axis=1):
    method = methods.get(name)
    given = {option.name: option.default for option in method.options}
    tasks = TaskMatrices.of(matrices, input_axis=input_axis)
    return calibrate(method.merge(tasks, given), tasks, alpha)


def plain(matrices):
    return [M.double().numpy() for M in matrices]


def close(M, other, scale, tolerance=1e-5):
    return float((M.double() - other.double()).norm()) <= tolerance * float(scale.double().norm())


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (1, 9), (9, 1)])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("input_axis", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_equals_the_oracle(shape, alpha, input_axis, count):
    matrices = falling(3, shape, count)
    found = of_sum(matrices, alpha, input_axis)
    wanted = subspace_oracles.calibrate(sum(plain(matrices)), plain(matrices), alpha, input_axis)
    assert distance(found.M, wanted) <= 1e-5
    assert found.record.norm_merged == pytest.approx(float(found.M.norm()), rel=1e-5)
    left = np.linalg.norm(wanted) / np.linalg.norm(sum(plain(matrices)))
    assert found.record.facts["calibration"] == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("input_axis", [0, 1])
def test_every_method_of_spectra_is_calibrated_in_one_way(name, input_axis):
    matrices = [M.double() for M in falling(5, (40, 30))]
    before = run(name, matrices, 0.0, input_axis)
    found = run(name, matrices, 1.0, input_axis)
    basis = before.features and [
        x.numpy() for x in (before.features.U, before.features.s, before.features.Vh)
    ]
    if basis and not input_axis:
        basis = [basis[2].T, basis[1], basis[0].T]
    wanted = subspace_oracles.calibrate(before.M.numpy(), plain(matrices), 1.0, input_axis, basis)
    assert distance(found.M, wanted) <= 1e-9
    assert distance(found.M, before.M.numpy()) > 1e-3


def test_methods_of_spectra_have_the_option():
    assert {"stf", "wudi", "tsv_m", "iso_c", "iso_cts", "knots"} <= set(SPECTRAL)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("input_axis", [0, 1])
def test_factors_stay_factors(name, input_axis, monkeypatch):
    factors = [LowRank(draw(i, 40, 3), draw(9 + i, 3, 28)) for i in range(3)]
    whole = [low.left.double() @ low.right.double() for low in factors]
    wanted = run(name, whole, 1.0, input_axis).M
    monkeypatch.setattr(LowRank, "dense", lambda _: pytest.fail("a whole matrix was formed"))
    found = run(name, factors, 1.0, input_axis).M
    assert isinstance(found, LowRank)
    assert distance(found.left @ found.right, wanted.numpy()) <= 1e-7


@pytest.mark.parametrize("name", SPECTRAL)
def test_zeros_give_zeros(name):
    assert not run(name, [torch.zeros(5, 4)] * 2, 1.0).M.any()


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(1, 5))
def test_equal_tasks_count_once(m, n, seed, times):
    A = draw(seed, m, n)
    assert close(of_sum([A] * times).M, A, A)


@LAW
@given(half=st.integers(1, 12), seed=SEEDS)
def test_tasks_with_inputs_and_outputs_of_their_own_are_left_as_they_are(half, seed):
    """In bases at random, where float32 leaves each task a little of the other's outputs."""
    U, V = (torch.linalg.qr(draw(seed + i, 2 * half, 2 * half).double()).Q for i in range(2))
    s = 0.7 ** torch.arange(2 * half).double()
    A = ((U[:, ::2] * s[::2]) @ V[:, ::2].mT).float()
    B = ((U[:, 1::2] * s[1::2]) @ V[:, 1::2].mT).float()
    assert close(of_sum([A, B]).M, A + B, A + B, 1e-3)


@LAW
@given(m=SIDES, half=st.integers(1, 12), seed=SEEDS)
def test_the_sum_of_tasks_with_inputs_of_their_own_is_left_as_it_is(m, half, seed):
    V = torch.linalg.qr(draw(seed, 2 * half, 2 * half).double()).Q
    A, B = (draw(seed + i, m, half).double() @ V[:, i::2].mT for i in range(2))
    assert close(of_sum([A, B]).M, A + B, A + B)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_negation_stay_nothing(m, n, seed):
    A = draw(seed, m, n)
    assert close(of_sum([A, -A]).M, 0 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, alpha=st.floats(0.05, 2.0))
def test_singular_values_grow_by_no_more_than_the_bound(m, n, seed, alpha):
    matrices = [draw(seed + i, m, n) for i in range(3)]
    S = sum(matrices)
    U, s, Vh = torch.linalg.svd(S.double(), full_matrices=False)
    turned = U.mT @ of_sum(matrices, alpha).M.double() @ Vh.mT
    assert close(turned.diagonal(), turned.diagonal().clamp(min=0), s, 1e-4)
    assert bool((turned.diagonal() <= s / alpha * (1 + 1e-3) + 1e-4 * s[0]).all())


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-100, 100))
def test_scaling_commutes_and_the_order_does_not_matter(m, n, seed, exponent):
    matrices = [M.float() for M in falling(seed, (max(m, n), min(m, n)))]
    M = of_sum(matrices).M
    assert close(of_sum(matrices[::-1]).M, M, M, 1e-4)
    scaled = of_sum([A * 2.0**exponent for A in matrices]).M.double() * 2.0**-exponent
    assert close(scaled, M, M)


@pytest.mark.parametrize(
    ("given", "expected"), [(True, 1.0), (False, 0.0), (0.25, 0.25), ("0.5", 0.5)]
)
def test_the_option_is_a_switch_or_the_bound(given, expected):
    assert CALIBRATE.parse(given) == expected
