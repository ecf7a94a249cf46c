"""The methods that treat every entry by itself, against their oracles, and the laws they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, STFError, TaskMatrices, methods
from tests import elementwise_oracles as oracles
from tests.core.cases import distance

ORACLES = {
    "pcb": oracles.pcb,
    "consensus_ta": oracles.consensus_ta,
    "localize_stitch": oracles.localize_stitch,
}
OPTIONS = {"pcb": {"ratio": 0.1}, "consensus_ta": {"mask": 0.4, "agreeing": 2}}
SHAPES = [(64, 48), (48, 64), (300, 256), (1, 9), (9, 1), (1, 1)]
SIDES = st.integers(2, 30)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=25, deadline=None)


def draw(seed, *shape):
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tasks_of(seed, shape, count=3):
    """Task matrices of different lengths that share a part."""
    shared = draw(seed + 99, *shape)
    return [(1 + i) * draw(seed + i, *shape) + shared for i in range(count)]


def merged(method, matrices, **options):
    given = OPTIONS.get(method, {}) | options
    return methods.get(method).merge(TaskMatrices.of(matrices), given)


def close(M, other, scale, tolerance=1e-5):
    return float((M.double() - other.double()).norm()) <= tolerance * float(scale.double().norm())


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_equals_the_oracle(method, shape, count):
    matrices = tasks_of(3, shape, count)
    wanted = ORACLES[method]([M.double().numpy() for M in matrices])
    M = merged(method, matrices).M
    assert M.shape == shape
    assert distance(M, wanted) <= 1e-5 if wanted.any() else not M.any()


@pytest.mark.parametrize("method", ORACLES)
def test_equals_the_oracle_of_sparse_tasks(method):
    matrices = [M * (draw(77 + i, 40, 30) > 0.01) for i, M in enumerate(tasks_of(5, (40, 30)))]
    wanted = ORACLES[method]([M.double().numpy() for M in matrices])
    assert distance(merged(method, matrices).M, wanted) <= 1e-5


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.9, 1.0])
def test_pcb_at_other_ratios(ratio):
    matrices = tasks_of(3, (80, 70))
    wanted = oracles.pcb([M.double().numpy() for M in matrices], ratio)
    assert distance(merged("pcb", matrices, ratio=ratio).M, wanted) <= 1e-5


def test_pcb_of_large_entries_saturates_as_the_oracle_does():
    matrices = [300 * M for M in tasks_of(3, (80, 70))]
    wanted = oracles.pcb([M.double().numpy() for M in matrices])
    assert distance(merged("pcb", matrices).M, wanted) <= 1e-5


@pytest.mark.parametrize("mask", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("agreeing", [1, 2, 3])
def test_consensus_at_other_masks(mask, agreeing):
    matrices = tasks_of(3, (80, 70))
    options = {"mask": mask, "agreeing": agreeing}
    wanted = oracles.consensus_ta([M.double().numpy() for M in matrices], **options)
    M = merged("consensus_ta", matrices, **options).M
    assert distance(M, wanted) <= 1e-5 if wanted.any() else not M.any()


@pytest.mark.parametrize("method", ORACLES)
def test_factors_become_the_whole_matrix(method):
    factors = [LowRank(0.1 * draw(i, 40, 3).double(), draw(9 + i, 3, 28).double()) for i in (1, 2)]
    factors.append(LowRank(torch.zeros(40, 0).double(), torch.zeros(0, 28).double()))
    M = merged(method, factors).M
    assert isinstance(M, torch.Tensor)
    wanted = ORACLES[method]([low.dense().numpy() for low in factors])
    assert distance(M, wanted) <= 1e-5


@pytest.mark.parametrize("method", ORACLES)
def test_zeros_give_zeros(method):
    assert not merged(method, [torch.zeros(5, 4)] * 2).M.any()


@pytest.mark.parametrize("method", ORACLES)
def test_the_record_is_of_the_whole_matrices_lengths(method):
    a, b = matrices = tasks_of(4, (40, 30), 2)
    record = merged(method, matrices).record
    assert record.norms == pytest.approx([float(a.norm()), float(b.norm())], rel=1e-5)
    assert record.norm_sum == pytest.approx(float((a + b).norm()), rel=1e-5)
    assert record.norm_merged == pytest.approx(float(merged(method, matrices).M.norm()), rel=1e-5)


def test_no_more_models_can_agree_than_there_are():
    with pytest.raises(STFError, match="agreeing: 3"):
        merged("consensus_ta", tasks_of(1, (4, 4), 2), agreeing=3)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_tasks_does_not_matter(m, n, seed, order):
    inputs = tasks_of(seed % 10**6, (m, n))
    for method in ORACLES:
        M = merged(method, inputs).M
        assert close(merged(method, [inputs[i] for i in order]).M, M, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_entries_may_be_arranged_in_any_way(m, n, seed):
    """Transposing and permuting entries, as splitting heads does, commutes with the merge."""
    inputs = tasks_of(seed % 10**6, (m, n))
    order = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))
    for method in ORACLES:
        M = merged(method, inputs).M
        turned = merged(method, [A.T.contiguous() for A in inputs]).M.T
        assert torch.equal(turned, M)
        mixed = merged(method, [A.reshape(-1)[order].reshape(n, m) for A in inputs]).M
        assert torch.equal(mixed.reshape(-1), M.reshape(-1)[order])


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-20, 0))
def test_scaling_commutes(m, n, seed, exponent):
    """For PCB as long as entries are small, where the hyperbolic tangent is linear."""
    inputs = [0.01 * M for M in tasks_of(seed % 10**6, (m, n))]
    for method in ORACLES:
        M = merged(method, inputs).M
        assert close(merged(method, [A * 2.0**exponent for A in inputs]).M, M * 2.0**exponent, M)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(2, 5))
def test_equal_tasks(m, n, seed, times):
    """Their mean for one, which is one of them; a part of it for PCB; their sum for consensus."""
    A = draw(seed, m, n)
    assert close(merged("localize_stitch", [A] * times).M, A, A)
    M = merged("pcb", [A] * times).M
    assert close(M, A * (M != 0), A)
    agreeing = merged("consensus_ta", [A] * times, mask=1 / times).M
    assert close(agreeing, times * A, A)
    assert not merged("consensus_ta", [A] * times, mask=1.01 / (times - 1)).M.any()


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_task_and_its_negation_give_nothing(m, n, seed):
    A = draw(seed, m, n)
    for method in ORACLES:
        assert not merged(method, [A, -A]).M.any()


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_tasks_that_share_no_entry(m, n, seed):
    """Their sum for stitching; a part of it for PCB; nothing for consensus, whose tasks are two."""
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    A[m // 2 :], B[: m // 2] = 0, 0
    assert torch.equal(merged("localize_stitch", [A, B]).M, A + B)
    M = merged("pcb", [A, B]).M
    assert close(M, (A + B) * (M != 0), A + B)
    assert not merged("consensus_ta", [A, B]).M.any()
    assert torch.equal(merged("consensus_ta", [A, B], agreeing=1).M, A + B)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, count=st.integers(1, 5))
def test_means_stay_between_the_tasks(m, n, seed, count):
    """No entry of PCB and of stitching is larger than the largest of the tasks' own."""
    inputs = tasks_of(seed % 10**6, (m, n), count)
    largest = torch.stack(inputs).abs().amax(dim=0)
    for method in ("pcb", "localize_stitch"):
        assert bool((merged(method, inputs).M.abs() <= largest * (1 + 1e-6)).all())
