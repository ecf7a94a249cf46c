"""Drivers that fail, and the choice of a route."""

import sys
from contextlib import nullcontext

import pytest
import torch

from mergekit_stf.core import STFError, decompose, superpose
from mergekit_stf.core.features import choose_route
from mergekit_stf.core.features.decompose import ROUTES
from mergekit_stf.core.features.routes import eigen, lower_gram
from tests.core.cases import with_equal_lengths


def matrix(m=60, n=40, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def failing(original, times):
    calls = []

    def driver(*args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise torch.linalg.LinAlgError("the algorithm failed to converge\nsecond line")
        return original(*args, **kwargs)

    return driver


@pytest.mark.parametrize("route", [name for name in ROUTES if name != "svd"])
def test_a_failing_driver_is_replaced_with_one_warning(monkeypatch, route):
    expected = superpose([matrix(seed=1), matrix(seed=2)]).M
    monkeypatch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, 1))
    with pytest.warns(RuntimeWarning, match=rf"q_proj: decomposed by svd \({route}: the") as seen:
        M = superpose([matrix(seed=1), matrix(seed=2)], route=route, name="q_proj").M
    assert len(seen) == 1
    assert float((M - expected).norm() / expected.norm()) <= 2e-4


def test_float64_on_the_cpu_is_the_last_resort(monkeypatch):
    expected = decompose(matrix())
    monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd, 1))
    with pytest.warns(RuntimeWarning, match="k_proj: decomposed by cpu"):
        found = decompose(matrix(), route="svd", name="k_proj")
    torch.testing.assert_close(found.s, expected.s)


def test_a_driver_that_always_fails_names_the_weight(monkeypatch):
    for driver in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, driver, failing(getattr(torch.linalg, driver), 10**9))
    with pytest.raises(STFError, match=r"v_proj: no driver decomposes it \(gram_float64: the"):
        decompose(matrix(), name="v_proj")


def test_a_driver_that_returns_nan_is_replaced(monkeypatch):
    def broken(x, *args, **kwargs):
        values, vectors = original(x, *args, **kwargs)
        return torch.return_types.linalg_eigh((values, vectors * float("nan")))

    original = torch.linalg.eigh
    expected = decompose(matrix())
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.warns(RuntimeWarning, match="decomposed by svd"):
        found = decompose(matrix())
    torch.testing.assert_close(found.s, expected.s)


def test_a_shortcut_that_fails_is_replaced_by_the_exact_route(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge\nmore")

    M = matrix(300, 280)
    expected = torch.linalg.svdvals(M)
    monkeypatch.setattr(torch.linalg, "qr", fail)
    with pytest.warns(RuntimeWarning, match=r"w: decomposed by gram_float64 \(leading: did not"):
        found = decompose(M, 0.1, name="w")
    torch.testing.assert_close(found.s, expected[: found.rank], rtol=1e-5, atol=1e-5)
    assert found.rank == 28


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_take_the_place_of_the_matrix(monkeypatch, dtype):
    """At 8192 × 8192 one copy more would be half a gigabyte."""
    seen = []

    def driver(x, *args, out, **kwargs):
        seen.append(out[1].data_ptr() == x.data_ptr())
        return original(x, *args, out=out, **kwargs)

    original = torch.linalg.eigh
    gram = lower_gram(matrix().to(dtype), dtype)
    expected, vectors = torch.linalg.eigh(gram)
    monkeypatch.setattr(torch.linalg, "eigh", driver)
    values, rows = eigen(gram)
    assert seen == [True]
    torch.testing.assert_close(values.flip(0), expected, rtol=1e-5, atol=1e-4)
    overlap = (rows.flip(0) @ vectors).abs().diagonal()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("dtype", "source", "route"),
    [
        (torch.float64, torch.float64, "svd"),
        (torch.float32, torch.float32, "gram_float64"),
        (torch.float32, torch.bfloat16, "gram_float32"),
        (torch.float32, torch.float16, "gram_float64"),
    ],
)
def test_the_route_on_a_cpu(dtype, source, route):
    assert choose_route(matrix().to(dtype), source) == route


@pytest.mark.parametrize(
    ("capability", "route"),
    [((9, 0), "gram_float64"), ((8, 0), "gram_float64"), ((8, 9), "gram_refined")],
)
def test_the_route_on_a_card_follows_its_float64_rate(monkeypatch, capability, route):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnCard:
        dtype = torch.float32
        device = torch.device("cuda", 0)
        shape = (28672, 8192)
        itemsize = 4

        def numel(self):
            return self.shape[0] * self.shape[1]

    assert choose_route(OnCard(), torch.float32) == route
    assert choose_route(OnCard(), torch.bfloat16) == route
    OnCard.shape = (8192, 8192)
    assert choose_route(OnCard(), torch.float32) == "gram_refined"  # float64 would take 2.7 GB


@pytest.mark.parametrize(("rank", "turns"), [(1.0, 1), (0.1, 0)])
def test_exact_routes_wait_for_their_turn_and_shortcuts_do_not(monkeypatch, rank, turns):
    taken = []

    def turn(M):
        taken.append(M)
        return nullcontext()

    monkeypatch.setattr(sys.modules[choose_route.__module__], "lock_if_large", turn)
    s = (1 + torch.arange(280.0)) ** -1.5
    decompose(matrix(300, 280) * s, rank)
    assert len(taken) == turns


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-4, 1e-2])
def test_a_long_run_of_close_values_gives_the_matrix_back(spread):
    """More of them than are separated in float64, so that rotations alone leave them askew."""
    M = with_equal_lengths(700, spread)
    found = decompose(M, route="gram_refined")
    assert float((found.U * found.s @ found.Vh - M).norm() / M.norm()) <= 1e-5
    assert float((found.Vh @ found.Vh.mT - torch.eye(700)).abs().max()) <= 1e-5
