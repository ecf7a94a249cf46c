import numpy as np
import pytest
import torch

from mergekit_stf.core import decompose, superpose, truncated
from mergekit_stf.core.truncated import leading, low_rank
from tests import oracle
from tests.core.cases import distance, spectrum


def decaying(m, n, seed):
    return spectrum(m, n, 1 / (1 + torch.arange(n) / 20.0), seed)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
@pytest.mark.parametrize("rank", [0.2, 0.05, 25])
def test_leading_features_equal_the_oracle_that_keeps_as_many(shape, rank):
    inputs = [decaying(max(shape), min(shape), seed) for seed in range(3)]
    inputs = [M if M.shape == shape else M.mT for M in inputs]
    result = superpose(inputs, rank=rank)
    kept = int(rank * 300) if rank < 1 else rank
    assert result.report.ranks == (kept,) * 3
    assert set(result.report.routes) == {"krylov"}
    expected = oracle.superpose([M.double().numpy() for M in inputs], kept)
    assert distance(result.M, expected) <= 1e-3


def test_a_steep_spectrum_is_not_blurred_where_it_is_cut():
    inputs = [spectrum(640, 640, (1 + torch.arange(640) / 8) ** -1.5, seed) for seed in (1, 2)]
    result = superpose(inputs, rank=0.2)
    assert set(result.report.routes) == {"krylov"}
    expected = oracle.superpose([M.double().numpy() for M in inputs], 128)
    assert distance(result.M, expected) <= 2e-5


def test_a_flat_spectrum_falls_back_to_the_exact_route():
    flat = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    assert leading(flat, 60) is None
    result = superpose([flat, decaying(300, 300, 1)], rank=0.2)
    assert result.report.routes == ("gram_float64", "krylov")
    inputs = [flat.double().numpy(), decaying(300, 300, 1).double().numpy()]
    assert distance(result.M, oracle.superpose(inputs, 60)) <= 1e-3


def test_many_features_of_many_are_left_to_the_exact_route():
    assert leading(decaying(300, 300, 0), 200) is None
    assert leading(decaying(100, 100, 0), 10) is None


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_a_low_rank_is_recognised(rank):
    generator = torch.Generator().manual_seed(rank)
    A, B = torch.randn(350, rank, generator=generator), torch.randn(rank, 280, generator=generator)
    found = low_rank(A @ B)
    assert found.rank == rank
    s = np.linalg.svd((A @ B).double().numpy(), compute_uv=False)[:rank]
    np.testing.assert_allclose(found.s.numpy(), s, rtol=1e-5)


def test_an_adapter_that_was_merged_in_float32_is_recognised():
    generator = torch.Generator().manual_seed(7)
    base = 0.02 * torch.randn(320, 320, generator=generator)
    adapters = [
        0.002
        * torch.randn(320, 16, generator=generator)
        @ torch.randn(16, 320, generator=generator)
        for _ in range(3)
    ]
    inputs = [(base + adapter) - base for adapter in adapters]
    result = superpose(inputs)
    assert result.report.routes == ("low_rank",) * 3
    assert result.report.ranks == (16,) * 3
    exact = oracle.superpose([M.double().numpy() for M in inputs], 16)
    assert distance(result.M, exact) <= 1e-5


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 3e-6])
def test_what_is_nearly_of_low_rank_is_not_cut(tail):
    s = torch.cat([torch.linspace(2, 1, 20), torch.full((280,), tail)])
    assert low_rank(spectrum(320, 300, s, 2)) is None


def test_full_rank_is_not_of_low_rank():
    assert low_rank(torch.randn(300, 300, generator=torch.Generator().manual_seed(0))) is None


def test_same_bytes_again():
    M = decaying(300, 260, 5)
    first, second = leading(M, 40), leading(M, 40)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)


def test_a_low_rank_that_a_part_does_not_tell_is_left_to_the_sketch(monkeypatch):
    """And one that it tells needs no sketch: the part alone decides for most matrices."""
    generator = torch.Generator().manual_seed(3)
    part_of_low_rank = torch.randn(320, 320, generator=generator)
    part_of_low_rank[::8] = 0
    part_of_low_rank[::8, 0] = 1
    sketches = []
    start = truncated._start
    monkeypatch.setattr(truncated, "_start", lambda *given: sketches.append(given) or start(*given))
    assert low_rank(torch.randn(320, 320, generator=generator)) is None
    assert not sketches
    assert low_rank(part_of_low_rank) is None
    assert sketches


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_both_products_read_their_matrix_by_rows(shape, monkeypatch):
    """A wide matrix comes as a transposed view."""
    reads, applied = [], truncated._applied
    monkeypatch.setattr(truncated, "_applied", lambda *x: reads.append(x[0]) or applied(*x))
    M = decaying(400, 300, 1)
    assert decompose(M if shape == M.shape else M.mT.contiguous(), 30).route == "krylov"
    assert {tuple(A.shape) for A in reads} == {(400, 300), (300, 400)}
    assert all(A.is_contiguous() for A in reads)


def test_a_large_matrix_is_read_a_few_times_for_a_few_features(monkeypatch):
    """Blocks of two columns, a sixteenth of the features, would read it thirty times and more."""
    M, reads = decaying(1024, 1024, 4), []
    applied = truncated._applied
    monkeypatch.setattr(truncated, "_applied", lambda *x: reads.append(x) or applied(*x))
    assert leading(M, 20).rank == 20
    assert len(reads) <= 16
