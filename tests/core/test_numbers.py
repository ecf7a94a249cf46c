"""The numbers of a record against the whole matrices: every entry counts, none is sampled."""

import pytest
import torch

from mergekit_stf.core import LowRank, TaskMatrices, decompose, superpose
from mergekit_stf.core.solve.gram import Blocks, Products, Whole


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosines(matrices):
    flat = torch.stack([M.flatten().double() for M in matrices])
    flat = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-300)
    return flat @ flat.mT


def sharing(side, lines, columns):
    """Two tasks with a few long rows, or columns, in common, at the end, and noise elsewhere."""
    common = 3 * draw(1, lines, side)
    pair = [0.1 * draw(2, side, side), 0.1 * draw(3, side, side)]
    for M in pair:
        M[-lines:] = common
    return [M.mT.contiguous() for M in pair] if columns else pair


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("side", [64, 256])
def test_what_a_few_rows_or_columns_share_is_seen(side, columns):
    """Every 64th entry of a matrix of 64 columns is a single column."""
    pair = sharing(side, 4, columns)
    record = superpose(pair).record
    expected = float(cosines(pair)[0, 1])
    assert expected > 0.9
    assert record.cosine[0][1] == pytest.approx(expected, abs=5e-6)
    assert record.norm_sum == pytest.approx(float((pair[0] + pair[1]).norm()), rel=5e-6)
    assert record.norm_merged == pytest.approx(float(superpose(pair).M.norm()), rel=1e-6)


@pytest.mark.parametrize("form", [Whole, Blocks, Products])
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_every_form_of_the_gram_matrix_tells_the_cosines(form, exponent):
    matrices = [*sharing(48, 3, False), draw(5, 48, 48)]
    features = [decompose(2.0**exponent * M) for M in matrices]
    torch.testing.assert_close(form(features).cosines(), cosines(matrices), rtol=0, atol=1e-6)


def test_task_matrices_tell_them_without_a_decomposition():
    matrices = [*sharing(160, 3, True), torch.zeros(160, 160), 2.0**90 * draw(5, 160, 160)]
    tasks = TaskMatrices.of(matrices)
    torch.testing.assert_close(tasks.cosines(), cosines(matrices), rtol=0, atol=1e-7)
    lengths = [float(M.double().norm()) for M in matrices]
    torch.testing.assert_close(
        torch.tensor(tasks.norms()), torch.tensor(lengths), rtol=1e-6, atol=0
    )


def test_and_of_factors_too():
    factors = [LowRank(draw(i, 30, 3).double(), draw(i + 9, 3, 20).double()) for i in range(3)]
    factors.append(LowRank(torch.zeros(30, 0).double(), torch.zeros(0, 20).double()))
    tasks = TaskMatrices.of(factors)
    whole = [low.dense() for low in factors]
    torch.testing.assert_close(tasks.cosines(), cosines(whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(tasks.total().dense(), sum(whole))
    assert superpose(factors).record.cosine[0][1] == pytest.approx(float(cosines(whole)[0, 1]))
