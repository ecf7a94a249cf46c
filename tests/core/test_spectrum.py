from __future__ import annotations

import pytest
import torch

from mergekit_stf.core.features import decompose, spectrum_ranks


@pytest.mark.parametrize("count", [1, 2, 16, 1000])
def test_ranks_run_from_the_first_to_the_last(count: int) -> None:
    ranks = spectrum_ranks(count)
    assert (ranks[0], ranks[-1], len(ranks)) == (1, count, 16)
    assert ranks == sorted(ranks)


def test_a_zero_matrix_has_no_spectrum() -> None:
    assert spectrum_ranks(0) == []
    assert decompose(torch.zeros(4, 3)).spectrum == ()


def test_a_spectrum_holds_the_singular_values_at_the_ranks() -> None:
    M = torch.diag(torch.arange(40.0, 0.0, -1.0))
    expected = [41.0 - rank for rank in spectrum_ranks(40)]
    assert decompose(M).spectrum == pytest.approx(expected, rel=1e-5)
