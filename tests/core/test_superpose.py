"""The engine against the float64 oracle, and the constraints that define the merged matrix."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mergekit_stf.core import decompose, precision, superpose, trim
from mergekit_stf.core.features import refinement, routes
from mergekit_stf.core.features.decompose import ROUTES
from tests.core.cases import (
    BOUND,
    CLOSE,
    distance,
    expected,
    spectrum,
    with_close_runs,
    with_equal_lengths,
)

SHAPES = [(48, 48), (96, 40), (40, 96), (1, 33), (33, 1), (1, 1), (257, 64)]


def matrices(shape, tasks, seed=0, density=1.0, shared=0.3):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [
        trim(torch.randn(shape, generator=generator) + shared * common, density)
        for _ in range(tasks)
    ]


@pytest.mark.parametrize(
    ("shape", "tasks"),
    [(s, t) for s in SHAPES for t in (1, 2, 3, 7) if t * min(s) <= s[0] * s[1]],
)
def test_equals_the_oracle(shape, tasks):
    """With more features than entries the constraints cannot all hold; those are left out."""
    inputs = matrices(shape, tasks, seed=tasks)
    assert distance(superpose(inputs).M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(64, 64), (96, 128)])
def test_equals_the_oracle_for_sixteen_tasks(shape, seed):
    inputs = matrices(shape, 16, seed, shared=0.0)
    assert distance(superpose(inputs).M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("density", [0.5, 0.2, 0.05, 0.01])
def test_equals_the_oracle_of_trimmed_matrices(density, seed):
    inputs = matrices((120, 90), 3, seed, density=density)
    assert distance(superpose(inputs).M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 96), (96, 256)])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_every_route_equals_the_oracle(route, shape, density):
    inputs = matrices(shape, 3, seed=11, density=density)
    result = superpose(inputs, route=route)
    assert set(result.record.routes) == {route}
    assert distance(result.M, expected(inputs)) <= BOUND[route]


@pytest.fixture
def one_thread():
    """Decompose in the merge and in the test alike: rounding differs between thread counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_every_route_meets_every_constraint(route, seed):
    inputs = matrices((200, 150), 4, seed)
    M = superpose(inputs, route=route).M.double()
    for matrix in inputs:
        f = decompose(matrix, route=route)
        response = ((f.U.double().mT @ M) * f.Vh.double()).sum(dim=1)
        assert float((response - f.s).abs().max()) <= 1e-5 * float(f.s[0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_every_route_reproduces_its_matrix(route, seed):
    (matrix,) = matrices((150, 100), 1, seed)
    f = decompose(matrix, route=route)
    back = (f.U.double() * f.s) @ f.Vh.double()
    assert float((back - matrix).norm() / matrix.norm()) <= 2e-6
    assert torch.equal(f.s, f.s.sort(descending=True).values)


def steep(shape):
    return [M * 10.0 ** -torch.linspace(0, 5, shape[1]) for M in matrices(shape, 2, seed=6)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decades", [2, 3, 4])
@pytest.mark.parametrize("route", ["gram_float32", "gram_refined"])
def test_left_vectors_of_short_features_are_orthogonal_to_the_others(route, decades, seed):
    """Rounding leaves ``eps s_1`` along them in each image: 1e-3 of one of 1e-4 ``s_1``."""
    s = torch.logspace(0, -decades, 256).double()
    found = decompose(spectrum(300, 256, s, seed), route=route)
    apart = found.U.mT @ found.U - torch.eye(found.rank)
    assert float(apart.abs().max()) <= {"gram_float32": 5e-4, "gram_refined": 5e-6}[route]


def test_short_images_are_formed_in_float64(monkeypatch):
    """In float32 the rounding of the long ones would show in them."""
    s = 10.0 ** -torch.linspace(0, 5, 90)
    left, right = matrices((120, 90), 2, seed=3), matrices((90, 90), 2, seed=4)
    bases = zip(map(torch.linalg.qr, left), map(torch.linalg.qr, right), strict=True)
    inputs = [(U.Q * s) @ V.Q.mT for U, V in bases]
    assert distance(superpose(inputs, route="gram_float64").M, expected(inputs)) <= 3e-6
    monkeypatch.setattr(routes, "HEAD", 0.0)
    assert distance(superpose(inputs, route="gram_float64").M, expected(inputs)) > 1e-5


@pytest.mark.parametrize("shape", [(120, 40), (40, 120)])
def test_large_matrices_are_converted_part_by_part(monkeypatch, shape):
    """With long and short images, of which only the short ones are formed in float64."""
    inputs = steep(shape)
    whole = superpose(inputs, route="gram_float64")
    monkeypatch.setattr(precision, "CHUNK", 1000)
    parts = superpose(inputs, route="gram_float64")
    assert set(parts.record.routes) == {"gram_float64"}
    assert distance(whole.M, expected(inputs)) <= 1e-5
    assert distance(parts.M, expected(inputs)) <= 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(3))
def test_a_low_rank_has_no_more_features(route, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(90, 7, generator=generator) @ torch.randn(7, 70, generator=generator)
        for _ in range(3)
    ]
    result = superpose(inputs, route=route)
    assert result.record.kept == (7, 7, 7)
    assert distance(result.M, expected(inputs)) <= 1e-5


def test_float64_inputs_keep_their_accuracy():
    inputs = [M.double() for M in matrices((60, 80), 5, seed=6)]
    result = superpose(inputs)
    assert result.M.dtype == torch.float64
    assert distance(result.M, expected(inputs)) <= 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kept", [1, 5, 30])
def test_keeps_the_leading_features(kept, seed):
    inputs = matrices((64, 48), 3, seed)
    result = superpose(inputs, rank=kept if kept > 1 else 1 / 48)
    assert result.record.kept == (kept,) * 3
    assert distance(result.M, expected(inputs, kept)) <= 1e-5


@pytest.mark.parametrize(("rank", "kept"), [(1.0, 48), (0.5, 24), (0.2, 9), (1e-9, 1), (100, 48)])
def test_rank_is_a_fraction_or_a_count(rank, kept):
    inputs = matrices((64, 48), 2, seed=9)
    assert superpose(inputs, rank=rank).record.kept == (kept, kept)


@pytest.mark.parametrize("rank", [0, -1, -0.5, float("nan")])
def test_refuses_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank must be"):
        superpose(matrices((4, 4), 2), rank=rank)


def test_inputs_are_not_changed():
    inputs = matrices((40, 30), 3)
    before = [M.clone() for M in inputs]
    superpose(inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_zero_matrix_is_no_feature():
    a, b = matrices((40, 30), 2)
    result = superpose([a, torch.zeros(40, 30), b])
    assert result.record.kept == (30, 0, 30)
    assert distance(result.M, expected([a, b])) <= 1e-5
    assert not superpose([torch.zeros(4, 6)] * 3).M.any()


def test_empty_rows_and_columns_cost_nothing_and_change_nothing():
    inputs = matrices((80, 60), 3, seed=12)
    for i, M in enumerate(inputs):
        M[i::7] = 0
        M[:, 2 * i :: 5] = 0
    result = superpose(inputs)
    assert distance(result.M, expected(inputs)) <= 1e-5
    assert all(kept <= 48 for kept in result.record.kept)


def test_refuses_shapes_that_differ_and_no_matrix():
    with pytest.raises(ValueError, match="shapes differ"):
        superpose([torch.ones(2, 3), torch.ones(3, 2)], name="q_proj")
    with pytest.raises(ValueError, match="at least one"):
        superpose([])


def test_same_bytes_again():
    inputs = matrices((130, 70), 4)
    assert torch.equal(superpose(inputs).M, superpose(inputs).M)


def test_reduced_precision_of_the_process_does_not_reach_the_engine():
    inputs = matrices((96, 96), 3)
    reference = superpose(inputs).M
    torch.set_float32_matmul_precision("medium")
    try:
        result = superpose(inputs).M
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(result, reference)


@pytest.mark.parametrize("exponent", [-120, -70, 70, 120])
def test_the_report_holds_lengths_of_any_size(exponent):
    inputs = matrices((48, 40), 3)
    plain = superpose(inputs)
    far = superpose([2.0**exponent * M for M in inputs])
    times = 2.0**exponent
    np.testing.assert_allclose(far.record.norms, np.multiply(plain.record.norms, times), rtol=1e-6)
    np.testing.assert_allclose(far.record.norm_merged, plain.record.norm_merged * times, rtol=1e-6)
    np.testing.assert_allclose(far.record.norm_sum, plain.record.norm_sum * times, rtol=1e-6)
    assert far.record.energy == pytest.approx(plain.record.energy, rel=1e-6)
    assert far.record.routes == plain.record.routes


def test_report_tells_lengths_and_overlaps():
    a, b, c = matrices((50, 60), 3, seed=3)
    record = superpose([a, b, c]).record
    np.testing.assert_allclose(record.norms, [float(M.norm()) for M in (a, b, c)], rtol=1e-5)
    np.testing.assert_allclose(record.norm_sum, float((a + b + c).norm()), rtol=1e-5)
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    np.testing.assert_allclose(record.cosine[0][1], cosine, rtol=1e-5)
    assert record.converged
    assert record.residual <= 1e-6
    assert record.cutoff == 0
    assert record.alpha_ratio == tuple(sorted(record.alpha_ratio))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(300, 256), (256, 300)])
def test_the_refined_route_undoes_what_an_eigensolver_mixes(shape, seed, monkeypatch):
    """A card's float32 eigensolver leaves a hundred-thousandth of the matrix, LAPACK less."""

    def mixing(gram):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(gram.shape, generator=generator)
        size = 1e-5 * torch.linalg.norm(gram + gram.tril(-1).mT) / torch.linalg.norm(noise)
        return original(gram + size * (noise + noise.mT) / 2)

    original, inputs = routes.eigen, matrices(shape, 3, seed)
    monkeypatch.setattr(refinement, "eigen", mixing)
    assert distance(superpose(inputs, route="gram_refined").M, expected(inputs)) <= 1e-5
    monkeypatch.setattr(refinement, "MAX_SWEEPS", 0)
    assert distance(superpose(inputs, route="gram_refined").M, expected(inputs)) > 2e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spread", [0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("seed", [3, 4])
def test_singular_values_that_are_equal_or_nearly_so_give_the_matrix_back(route, spread, seed):
    """No basis of them is better than another; whichever is found must be orthonormal."""
    M = with_equal_lengths(200, spread, seed)
    found = decompose(M, route=route)
    assert found.rank == 200
    assert float((found.U * found.s @ found.Vh - M).norm() / M.norm()) <= 1e-5
    eye = torch.eye(200)
    assert float((found.Vh @ found.Vh.mT - eye).abs().max()) <= 1e-5
    assert distance(superpose([M], route=route).M, M.double().numpy()) <= 1e-4


@pytest.mark.parametrize("gap", [1e-6, 3e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(320, 256), (256, 256)])
def test_close_features_are_told_apart_without_float64(gap, shape, monkeypatch):
    """Of 4096 random singular values two are now and then this close; float32 cannot tell them."""
    inputs = [with_close_runs(seed, gap, shape) for seed in range(3)]
    assert distance(superpose(inputs, route="gram_refined").M, expected(inputs)) <= 1e-5
    if gap <= 1e-5:
        monkeypatch.setattr(refinement, "CLOSE", 0.0)
        assert distance(superpose(inputs, route="gram_refined").M, expected(inputs)) > 2e-5


@pytest.mark.parametrize("gap", [1e-6, 3e-6, 1e-5])
def test_close_features_are_not_turned_by_noise(gap):
    """A turn by noise would be one of up to half a radian, after which nothing settles."""
    M = with_close_runs(0, gap)
    Vh = torch.linalg.svd(M, full_matrices=False).Vh
    _, largest = refinement.rotate_pairs(refinement.form_images(M, Vh), Vh)
    assert largest <= refinement.SMALL_ANGLE


def mixed_within(runs, Vh):
    """Rotate rows within runs by half a radian."""
    angle = torch.zeros(256, 256, dtype=torch.float64)
    for run in runs:
        for k, following in pairwise(run):
            angle[k, following], angle[following, k] = 0.5, -0.5
    return torch.matrix_exp(angle) @ Vh


@pytest.mark.parametrize(
    ("most", "at_a_time"), [(1, []), (2, [2, 2]), (3, [2, 3, 2]), (5, [2, 5]), (512, [7])]
)
def test_runs_of_close_features_are_told_apart_batch_by_batch(most, at_a_time, monkeypatch):
    """Runs of up to ``MOST`` are diagonalised to float64's precision, longer ones stay."""
    M, rows = with_close_runs(0, 1e-5), []

    def counted(A):
        rows.append(A.shape[1])
        return original(A)

    original = torch.linalg.qr
    exact = torch.linalg.svd(M.double(), full_matrices=False).Vh
    mixed = mixed_within(CLOSE, exact)
    image, Vh = (mixed @ M.double().mT).float(), mixed.float()
    monkeypatch.setattr(torch.linalg, "qr", counted)
    monkeypatch.setattr(refinement, "MOST", most)
    monkeypatch.setattr(refinement, "CLOSE", 2e-5)
    refinement.separate_close(M, image, Vh)
    assert rows == at_a_time
    found = torch.tensor([k for run in CLOSE if len(run) <= most for k in run], dtype=torch.long)
    others = torch.ones(256, dtype=torch.bool).index_fill(0, found, False)
    assert torch.equal(Vh[others], mixed.float()[others])
    overlap = (Vh.double() @ exact.mT).abs()
    assert float((overlap[found].amax(dim=1) - 1).abs().sum()) <= 1e-6
    assert float((Vh @ Vh.mT - torch.eye(256)).abs().max()) <= 1e-6
    assert float((image - Vh.double() @ M.double().mT).abs().max()) <= 1e-6


def test_noise_is_not_told_apart():
    """What is shorter than a millionth of the longest is no feature."""
    M = torch.diag(torch.tensor([1.0, 0.5, 1e-8, 1e-8]))
    Vh = torch.eye(4)
    Vh[2:, 2:] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    before = Vh.clone()
    refinement.separate_close(M, Vh @ M.mT, Vh)
    assert torch.equal(Vh, before)


class InOrder(TorchFunctionMode):
    """Sum each float32 product one term after another, as a card may; a CPU sums in parts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.matmul:
            return function(*args, **(kwargs or {}))
        A, B = args
        total = A.new_zeros(A.shape[0], B.shape[1])
        for k in range(A.shape[1]):
            total.addr_(A[:, k], B[k])
        return total


def test_short_images_are_not_drowned_by_long_ones():
    generator = torch.Generator().manual_seed(4)
    V, _ = torch.linalg.qr(torch.randn(4096, 40, generator=generator).double())
    U, _ = torch.linalg.qr(torch.randn(50, 40, generator=generator).double())
    M = ((U * torch.logspace(0, -5, 40)) @ V.mT).float()
    Vh = V.mT.float().contiguous()
    exact = Vh.double() @ M.double().mT
    length = torch.linalg.vector_norm(exact, dim=1)
    short = length < refinement.SHORT * length.max()
    with InOrder():
        found, plain = refinement.form_images(M, Vh), Vh @ M.mT
    error, before = (torch.linalg.vector_norm(x - exact, dim=1) for x in (found, plain))
    assert 10 < int(short.sum()) < 40
    assert float(error[short].mean() / before[short].mean()) <= 0.6
    assert torch.equal(error[~short], before[~short])
