import pytest
import torch

from mergekit_stf.core import decompose, superpose
from mergekit_stf.core.features import krylov
from mergekit_stf.core.features.krylov import leading
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
    assert result.record.kept == (kept,) * 3
    assert set(result.record.routes) == {"krylov"}
    expected = oracle.superpose([M.double().numpy() for M in inputs], kept)
    assert distance(result.M, expected) <= 1e-3


def test_a_steep_spectrum_is_not_blurred_where_it_is_cut():
    inputs = [spectrum(640, 640, (1 + torch.arange(640) / 8) ** -1.5, seed) for seed in (1, 2)]
    result = superpose(inputs, rank=0.2)
    assert set(result.record.routes) == {"krylov"}
    expected = oracle.superpose([M.double().numpy() for M in inputs], 128)
    assert distance(result.M, expected) <= 2e-5


def test_a_flat_spectrum_falls_back_to_the_exact_route():
    flat = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    assert leading(flat, 60) is None
    result = superpose([flat, decaying(300, 300, 1)], rank=0.2)
    assert result.record.routes == ("gram_float64", "krylov")
    inputs = [flat.double().numpy(), decaying(300, 300, 1).double().numpy()]
    assert distance(result.M, oracle.superpose(inputs, 60)) <= 1e-3


def test_many_features_of_many_are_left_to_the_exact_route():
    assert leading(decaying(300, 300, 0), 200) is None
    assert leading(decaying(100, 100, 0), 10) is None


def test_same_bytes_again():
    M = decaying(300, 260, 5)
    first, second = leading(M, 40), leading(M, 40)
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.Vh, second.Vh)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_both_products_read_their_matrix_by_rows(shape, monkeypatch):
    """A wide matrix comes as a transposed view."""
    reads, applied = [], krylov._apply
    monkeypatch.setattr(krylov, "_apply", lambda *x: reads.append(x[0]) or applied(*x))
    M = decaying(400, 300, 1)
    assert decompose(M if shape == M.shape else M.mT.contiguous(), 30).route == "krylov"
    assert {tuple(A.shape) for A in reads} == {(400, 300), (300, 400)}
    assert all(A.is_contiguous() for A in reads)


def test_a_large_matrix_is_read_a_few_times_for_a_few_features(monkeypatch):
    """Blocks of two columns, a sixteenth of the features, would read it thirty times and more."""
    M, reads = decaying(1024, 1024, 4), []
    applied = krylov._apply
    monkeypatch.setattr(krylov, "_apply", lambda *x: reads.append(x) or applied(*x))
    assert leading(M, 20).rank == 20
    assert len(reads) <= 16
