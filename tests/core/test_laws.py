"""Laws that hold to rounding, for matrices that hypothesis draws."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import superpose

SIDES = st.integers(2, 40)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=40, deadline=None)
TOLERANCE = 2e-5


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def rotation(seed, n):
    Q, R = torch.linalg.qr(draw(seed, n, n).double())
    return Q * R.diagonal().sign()


def close(a, b, scale):
    return float((a.double() - b.double()).norm()) <= TOLERANCE * float(scale.norm())


def merged(*inputs):
    return superpose(inputs).M


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_one_task_gives_itself(m, n, seed):
    A = draw(seed, m, n)
    assert close(merged(A), A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(2, 4))
def test_a_duplicate_counts_once(m, n, seed, times):
    A = draw(seed, m, n)
    assert close(merged(*[A] * times), A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_negation_give_nothing(m, n, seed):
    A = draw(seed, m, n)
    assert close(merged(A, -A), 0 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_double_meet_halfway(m, n, seed):
    A = draw(seed, m, n)
    assert close(merged(A, 2 * A), 1.5 * A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, columns=st.booleans())
def test_orthogonal_spaces_add_up(m, n, seed, columns):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    if columns:
        A[:, n // 2 :] = 0
        B[:, : n // 2] = 0
    else:
        A[m // 2 :] = 0
        B[: m // 2] = 0
    assert close(merged(A, B), A + B, A + B)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_tasks_does_not_matter(m, n, seed, order):
    inputs = [draw(seed + i, m, n) for i in range(3)]
    M = merged(*inputs)
    assert close(merged(*[inputs[i] for i in order]), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS, factor=st.floats(1e-6, 1e6))
def test_scaling_commutes(m, n, seed, factor):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = merged(A, B) * factor
    assert close(merged(A * factor, B * factor), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS)
def test_transposition_commutes(m, n, seed):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = merged(A, B)
    assert close(merged(A.mT, B.mT).mT, M, M)


@LAW
@given(m=st.integers(8, 30), n=st.integers(8, 30), seed=SEEDS)
def test_orthogonal_changes_of_basis_commute(m, n, seed):
    A, B = draw(seed, m, n).double(), draw(seed + 1, m, n).double()
    L, R = rotation(seed + 2, m), rotation(seed + 3, n)
    M = L @ merged(A, B) @ R
    assert close(merged(L @ A @ R, L @ B @ R), M, M)


@LAW
@given(m=st.integers(8, 40), n=st.integers(8, 40), seed=SEEDS)
def test_it_is_the_shortest_matrix_that_meets_the_constraints(m, n, seed):
    """Any change within the constraints' null space is orthogonal to M."""
    inputs = [draw(seed + i, m, n).double() for i in range(2)]
    M = merged(*inputs)
    triples = [torch.linalg.svd(A, full_matrices=False) for A in inputs]
    rows = torch.cat([torch.einsum("mk,kn->kmn", U, Vh).flatten(1) for U, _, Vh in triples])
    change = draw(seed + 9, m * n).double()
    change -= rows.mT @ torch.linalg.lstsq(rows.mT, change.unsqueeze(1)).solution[:, 0]
    change /= change.norm().clamp(min=1e-12)
    assert abs(float(change @ M.flatten())) <= 1e-6 * float(M.norm())
