"""Parts of a weight, whole and in factors: taken out, put back, added to the base, cut short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_stf.core import LowRank
from mergekit_stf.core.low_rank import sum_of
from mergekit_stf.host.lora.adapter_file import truncate
from mergekit_stf.host.merging import parts as module
from mergekit_stf.host.merging.parts import Assembly, Index, add_to_base, part_shape, take_part

LINES = torch.tensor([0, 3, 5])
PLACES: list[Index] = [(LINES,), (slice(None), LINES)]


def matrix(seed: int, m: int = 40, n: int = 28, r: int = 4) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, r, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(r, n, generator=generator, dtype=torch.float64))


def whole(M: Tensor | LowRank) -> Tensor:
    return M.dense() if isinstance(M, LowRank) else M


@pytest.mark.parametrize("index", PLACES, ids=["rows", "columns"])
def test_parts_of_factors_are_those_of_the_product(index: Index) -> None:
    low = matrix(4)
    found = take_part(low, index)
    assert isinstance(found, LowRank)
    assert found.shape == part_shape(low.shape, index)
    torch.testing.assert_close(found.dense(), low.dense()[index])


@pytest.mark.parametrize("index", PLACES, ids=["rows", "columns"])
@pytest.mark.parametrize("factored", [True, False])
def test_a_part_is_put_into_its_place(index: Index, factored: bool) -> None:
    low = matrix(4)
    assembly = Assembly(low.shape)
    assembly.put(index, take_part(low if factored else low.dense(), index))
    expected = torch.zeros(40, 28, dtype=torch.float64)
    expected[index] = low.dense()[index]
    assert isinstance(assembly.M, LowRank) is factored
    torch.testing.assert_close(whole(assembly.M), expected)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_all_parts_make_the_whole(axis: int, factored: bool) -> None:
    low = matrix(7)
    M = low if factored else low.dense()
    lines = torch.arange(low.shape[axis])
    assembly = Assembly(low.shape)
    for own in (lines[::3], lines[1::3], lines[2::3]):
        index: Index = (own,) if axis == 0 else (slice(None), own)
        assembly.put(index, take_part(M, index))
    torch.testing.assert_close(whole(assembly.M), low.dense())


def test_experts_make_a_stack() -> None:
    stack = torch.stack([matrix(seed).dense() for seed in range(3)])
    assembly = Assembly(tuple(stack.shape))
    for expert in (2, 0, 1):
        assembly.put((expert,), take_part(stack, (expert,)))
    assert torch.equal(whole(assembly.M), stack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_sum_with_the_base_in_blocks_of_rows(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    low, compute = matrix(5), torch.promote_types(dtype, torch.float32)
    base = torch.randn(40, 28, generator=torch.Generator().manual_seed(6)).to(dtype)
    for M in (low, low.dense()):
        total = torch.cat([rows.clone() for rows in add_to_base(base, M, 0.8, compute)])
        assert total.dtype == compute
        exact = base.double() + 0.8 * low.dense()
        error = torch.linalg.norm(total.double() - exact) / torch.linalg.norm(exact)
        assert error < 10 * torch.finfo(compute).eps


def test_truncation_is_the_best_one_and_states_its_error() -> None:
    low = sum_of([matrix(seed) for seed in range(3)])
    short, dropped = truncate(low, 5)
    s = torch.linalg.svdvals(low.dense())
    assert short.rank == 5
    assert dropped == pytest.approx(float(torch.linalg.norm(s[5:])))
    assert float(torch.linalg.norm(low.dense() - short.dense())) == pytest.approx(dropped)
