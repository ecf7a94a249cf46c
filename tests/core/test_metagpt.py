"""MetaGPT's weighted sum against its oracle, and the laws that it keeps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import LowRank, STFError, TaskMatrices, methods
from tests.core.cases import distance
from tests.elementwise_oracles import metagpt

SIDES = st.integers(1, 30)
SEEDS = st.integers(0, 2**31)
LAW = settings(max_examples=25, deadline=None)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(matrices, squares=None):
    """Merge weights that are the whole of their models, unless other lengths are given."""
    own = [float(M.norm if isinstance(M, LowRank) else M.norm()) ** 2 for M in matrices]
    tasks = replace(TaskMatrices.of(matrices), squared_distances=tuple(squares or own))
    return methods.get("metagpt").merge(tasks, {})


def close(M, other, scale, tolerance=1e-5):
    return float((M - other).norm()) <= tolerance * float(scale.norm())


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("shape", [(64, 48), (1, 9), (1, 1)])
def test_equals_the_oracle(count, shape):
    matrices = [draw(seed, *shape) for seed in range(count)]
    squares = [1e-3 * (2 + seed) for seed in range(count)]
    wanted = metagpt([M.double().numpy() for M in matrices], squares)
    result = merged(matrices, squares)
    assert distance(result.M, wanted) <= 1e-5
    assert result.record.facts["largest_share"] == pytest.approx(max(squares) / sum(squares))


def test_factors_stay_factors():
    factors = [LowRank(draw(i, 40, 3).double(), draw(9 + i, 3, 28).double()) for i in range(3)]
    factors.append(LowRank(torch.zeros(40, 0).double(), torch.zeros(0, 28).double()))
    M = merged(factors, squares=[1.0, 2.0, 3.0, 4.0]).M
    assert isinstance(M, LowRank)
    assert M.rank == 9
    wanted = metagpt([low.dense().numpy() for low in factors], [1.0, 2.0, 3.0, 4.0])
    assert distance(M.dense(), wanted) <= 1e-12


def test_models_that_are_the_base_give_nothing():
    assert not merged([torch.zeros(5, 4)] * 2).M.any()


def test_it_needs_the_lengths_of_the_whole_models():
    with pytest.raises(STFError, match="layer: metagpt needs the lengths of the whole models"):
        methods.get("metagpt").merge(TaskMatrices.of([draw(1, 3, 3)], name="layer"), {})


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, times=st.integers(1, 5))
def test_equal_models_give_that_model(m, n, seed, times):
    A = draw(seed, m, n)
    assert close(merged([A] * times).M, A, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_a_model_and_its_negation_give_nothing(m, n, seed):
    A = draw(seed, m, n)
    assert not merged([A, -A]).M.any()


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, factor=st.floats(0.1, 10))
def test_of_a_model_and_a_multiple_the_longer_one_counts_by_its_square(m, n, seed, factor):
    A = draw(seed, m, n)
    expected = (1 + factor**3) / (1 + factor**2) * A
    assert close(merged([A, factor * A]).M, expected, expected)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, exponent=st.integers(-40, 40))
def test_scaling_all_models_commutes(m, n, seed, exponent):
    A, B = draw(seed, m, n), draw(seed + 1, m, n)
    M = merged([A, B]).M
    assert close(merged([A * 2.0**exponent, B * 2.0**exponent]).M * 2.0**-exponent, M, A)


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS, order=st.permutations([0, 1, 2]))
def test_the_order_of_models_does_not_matter(m, n, seed, order):
    inputs = [(1 + i) * draw(seed + i, m, n) for i in range(3)]
    assert close(merged([inputs[i] for i in order]).M, merged(inputs).M, inputs[2])


@LAW
@given(m=SIDES, n=SIDES, seed=SEEDS)
def test_what_orthogonal_models_keep_of_themselves_is_their_share(m, n, seed):
    """``<M, M_i> = λ_i |M_i|²`` where no model has an entry that another has."""
    A, B = draw(seed, m + 1, n), draw(seed + 1, m + 1, n)
    A[m // 2 + 1 :], B[: m // 2 + 1] = 0, 0
    M, squares = merged([A, B]).M, float(A.square().sum() + B.square().sum())
    kept = float((M * A).sum())
    assert kept == pytest.approx(float(A.square().sum()) ** 2 / squares, rel=1e-4)
