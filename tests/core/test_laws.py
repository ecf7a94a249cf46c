"""Laws that hold to rounding on every route, for matrices that hypothesis draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import superpose
from mergekit_stf.core.features.decompose import ROUTES

SIDES = st.integers(2, 40)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=25, deadline=None)
TOLERANCE = dict.fromkeys(ROUTES, 2e-3) | {"gram_float64": 2e-5, "auto": 2e-5}
"""Float32 routes turn features of nearly the same size into each other, which M hardly shows."""


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def rotation(seed, n):
    Q, R = torch.linalg.qr(draw(seed, n, n).double())
    return Q * R.diagonal().sign()


@pytest.fixture(params=["auto", *ROUTES], scope="module")
def law(request):
    return Law(request.param)


class Law:
    """The merge on one route, and its tolerance."""

    def __init__(self, route):
        self.route = route

    def merged(self, *inputs):
        return superpose(inputs, route=self.route).M

    def close(self, a, b, scale):
        error = float((a.double() - b.double()).norm())
        return error <= TOLERANCE[self.route] * float(scale.double().norm())


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_one_task_gives_itself(law, m, n, seed):
    A = draw(seed, m, n)
    assert law.close(law.merged(A), A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(2, 4))
def test_a_duplicate_counts_once(law, m, n, seed, times):
    A = draw(seed, m, n)
    assert law.close(law.merged(*[A] * times), A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_negation_give_nothing(law, m, n, seed):
    A = draw(seed, m, n)
    assert law.close(law.merged(A, -A), 0 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_double_meet_halfway(law, m, n, seed):
    A = draw(seed, m, n)
    assert law.close(law.merged(A, 2 * A), 1.5 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, columns=st.booleans())
def test_orthogonal_spaces_add_up(law, m, n, seed, columns):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    if columns:
        A[:, n // 2 :] = 0
        B[:, : n // 2] = 0
    else:
        A[m // 2 :] = 0
        B[: m // 2] = 0
    assert law.close(law.merged(A, B), A + B, A + B)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_tasks_does_not_matter(law, m, n, seed, order):
    inputs = [draw(seed + i, m, n) for i in range(3)]
    M = law.merged(*inputs)
    assert law.close(law.merged(*[inputs[i] for i in order]), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS, factor=st.floats(1e-6, 1e6))
def test_scaling_commutes(law, m, n, seed, factor):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = law.merged(A, B) * factor
    assert law.close(law.merged(A * factor, B * factor), M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-110, 110))
def test_scaling_commutes_where_squares_overflow_or_vanish(law, m, n, seed, exponent):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = law.merged(A, B).double() * 2.0**exponent
    assert law.close(law.merged(A * 2.0**exponent, B * 2.0**exponent), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS)
def test_transposition_commutes(law, m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = law.merged(A, B)
    assert law.close(law.merged(A.mT, B.mT).mT, M, M)


@LAW
@given(m=st.integers(8, 30), n=st.integers(8, 30), seed=SEEDS)
def test_orthogonal_changes_of_basis_commute(law, m, n, seed):
    A, B = draw(seed, m, n).double(), draw(seed + 1, m, n).double()
    L, R = rotation(seed + 2, m), rotation(seed + 3, n)
    M = L @ law.merged(A, B) @ R
    assert law.close(law.merged(L @ A @ R, L @ B @ R), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS)
def test_it_is_the_shortest_matrix_that_meets_the_constraints(law, m, n, seed):
    """Any change within the constraints' null space is orthogonal to M."""
    inputs = [draw(seed + i, m, n).double() for i in range(2)]
    M = law.merged(*inputs)
    triples = [torch.linalg.svd(A, full_matrices=False) for A in inputs]
    rows = torch.cat([torch.einsum("mk,kn->kmn", U, Vh).flatten(1) for U, _, Vh in triples])
    change = draw(seed + 9, m * n).double()
    change -= rows.mT @ torch.linalg.lstsq(rows.mT, change.unsqueeze(1)).solution[:, 0]
    change /= change.norm().clamp(min=1e-12)
    assert abs(float(change @ M.flatten())) <= 1e-6 * float(M.norm())


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-900, 900))
def test_scaling_commutes_in_float64_as_far_as_it_reaches(m, n, seed, exponent):
    """No square of an entry is formed that overflows or vanishes, and no length is lost."""
    A, B = draw(seed, m, n).double(), draw(seed + 1, m, n).double()
    near, far = superpose([A, B]), superpose([A * 2.0**exponent, B * 2.0**exponent])
    assert float((far.M * 2.0**-exponent - near.M).norm()) <= 1e-9 * float(near.M.norm())
    assert far.record.norm_sum == pytest.approx(near.record.norm_sum * 2.0**exponent)
    assert far.record.norm_merged == pytest.approx(near.record.norm_merged * 2.0**exponent)
