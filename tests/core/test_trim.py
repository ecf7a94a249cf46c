import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_stf.core import trim
from mergekit_stf.core.trim import SAMPLE, kept_entries, kth_largest
from tests import oracle


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=40),
    density=st.floats(0.001, 1),
)
def test_equals_a_stable_sort_with_many_ties(values, density):
    x = torch.tensor(values, dtype=torch.float32)
    expected = oracle.trim(x.double().numpy(), density)
    np.testing.assert_array_equal(trim(x, density).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.999])
def test_equals_a_stable_sort_when_large(dtype, density):
    x = torch.randn(400, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert x.numel() > 8 * SAMPLE
    expected = oracle.trim(x.double().numpy(), density)
    np.testing.assert_array_equal(trim(x, density).double().numpy(), expected)


def test_equals_a_stable_sort_when_large_and_tied():
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    for density in (0.03, 0.2, 0.7):
        expected = oracle.trim(x.double().numpy(), density)
        np.testing.assert_array_equal(trim(x, density).numpy(), expected)


def test_a_sample_that_misleads_costs_time_and_no_exactness():
    x = torch.zeros(32 * SAMPLE)
    x[1::2] = torch.arange(16 * SAMPLE, dtype=torch.float32) + 1
    for k in (1, 5, 1000, 16 * SAMPLE, 20 * SAMPLE):
        found, reaching = kth_largest(x, k)
        assert found == x.sort(descending=True).values[k - 1]
        assert reaching == int((x >= found).sum())


@given(numel=st.integers(1, 10**6), density=st.floats(1e-9, 1))
def test_kept_entries(numel, density):
    kept = kept_entries(numel, density)
    assert kept == min(numel, max(1, int(np.floor(density * numel))))


def test_keeps_the_layout_and_the_input():
    x = torch.randn(30, 40).mT
    before = x.clone()
    np.testing.assert_array_equal(trim(x, 0.3).numpy(), oracle.trim(x.double().numpy(), 0.3))
    assert torch.equal(x, before)
    assert trim(x, 1.0) is x


def test_zero_stays_zero():
    assert not trim(torch.zeros(5, 5), 0.2).any()


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_refuses_what_is_no_fraction(density):
    with pytest.raises(ValueError, match="density must be in"):
        trim(torch.ones(3), density)
