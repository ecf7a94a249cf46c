"""The features of one task matrix: choose a route, bring the matrix into range, survive a driver.

A route is tried; where its driver fails or gives no finite answer, the library's singular value
decomposition is, and after that the same in float64 on the CPU, which no matrix of finite numbers
was seen to defeat. Each rescue is a warning that names the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features.features import Features, kept_rank
from mergekit_stf.core.features.krylov import leading
from mergekit_stf.core.features.refinement import gram_refined
from mergekit_stf.core.features.routes import Route, gram_float32, gram_float64, svd
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.pool import SQUARES, lock_if_large
from mergekit_stf.core.precision import far_exponent, scale_by_power

FLOAT64_CAPABILITIES = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
"""P100, V100, A100, H100 and H200, B200; other cards have 1/32 or 1/64 of float64."""


def choose_route(M: Tensor, source_dtype: torch.dtype) -> str:
    """Return the route for a task matrix: the cheapest one that is accurate enough.

    * float64 matrices keep the accuracy of their type: ``svd``;
    * on a CPU, bfloat16 checkpoints take ``gram_float32``: their rounding noise moves the merged
      matrix by at least ten times what that does, float16's not always
      (``benchmarks/accuracy.py``);
    * where float64 runs at a usable rate, ``gram_float64``, the most accurate one, which takes a
      data-centre card no longer than float32 does; unless its workspace is too large beside M;
    * otherwise ``gram_refined``: float32 throughout, so that it is as quick on a consumer GPU with
      1/64 of float64 as elsewhere, and still more accurate than a float32 SVD.
    """
    if M.dtype == torch.float64:
        return "svd"
    if source_dtype == torch.bfloat16 and M.device.type == "cpu":
        return "gram_float32"
    if has_float64(M.device) and not (M.device.type == "cuda" and _needs_much_memory(M)):
        return "gram_float64"
    return "gram_refined"


def has_float64(device: torch.device) -> bool:
    """Say whether float64 runs at half the rate of float32 or so: CPUs and data-centre cards."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.cuda.get_device_capability(device) in FLOAT64_CAPABILITIES


def decompose(
    M: Tensor | LowRank,
    rank: float = 1.0,
    route: str = "auto",
    source_dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Features:
    """Return the task-specific features of a task matrix (STF paper, section 3.2).

    Args:
        M: (m, n), float32 or float64, finite, of entries of any size; or in factors, whose
            features are found from these.
        rank: leading features to keep, a fraction up to 1 or a count above 1.
        route: a key of ``ROUTES``, or ``auto``.
        source_dtype: type of the checkpoints that ``M`` was computed from.
        name: of the weight, for warnings and errors.

    Returns:
        At most ``min(m, n)`` features with ``s_k > 1e-6 s_1``; none of a zero matrix.

    Raises:
        STFError: no driver decomposes the matrix, float64 on the CPU included.
    """
    count = kept_rank((M.shape[0], M.shape[1]), rank)
    if isinstance(M, LowRank):
        return Features(*M.svd(), "factored").leading(count)
    if not bool(torch.any(M)):
        return Features(M[:, :0], M.new_zeros(0), M[:0], "zero")
    tall = M if M.shape[0] >= M.shape[1] else M.mT
    exponent = far_exponent(tall)
    near = scale_by_power(tall, -exponent)
    failures: list[str] = []
    for attempt in _attempts(near, count, route, source_dtype):
        try:
            if attempt == "leading":
                found = leading(near, count)
            else:
                with lock_if_large(near):
                    found = WAYS[attempt](near)
        except RuntimeError as error:
            failures.append(f"{attempt}: {str(error).splitlines()[0]}")
            continue
        if found is None:
            continue
        if not (found.rank and bool(torch.isfinite(found.s).all())):
            failures.append(f"{attempt}: result is not finite")
            continue
        _warn(name, attempt, failures)
        kept = found.leading(count).times_power(exponent)
        return kept if tall is M else kept.transposed
    raise STFError(
        f"{name or 'a task matrix'}: no driver decomposes it ({'; '.join(failures)}); look for "
        "extreme values in this weight, or set `rule: sum` for it"
    )


def _attempts(M: Tensor, count: int, route: str, source_dtype: torch.dtype) -> list[str]:
    """Return the ways to decompose M in the order in which they are tried."""
    first = [route]
    if route == "auto":
        short = ["leading"] if count < M.shape[1] and M.dtype != torch.float64 else []
        first = [*short, choose_route(M, source_dtype)]
    return list(dict.fromkeys([*first, "svd", "cpu"]))


def _on_cpu(M: Tensor) -> Features:
    """Decompose in float64 on the CPU, the last resort."""
    found = svd(M.double().cpu())
    U, s, Vh = (x.to(M) for x in (found.U, found.s, found.Vh))
    return Features(U, s, Vh, "svd_float64_cpu")


ROUTES: Mapping[str, Route] = {
    "svd": svd,
    "gram_float64": gram_float64,
    "gram_float32": gram_float32,
    "gram_refined": gram_refined,
}
"""Ways from a matrix of at least as many rows as columns to all of its features."""

WAYS: Mapping[str, Route] = {**ROUTES, "cpu": _on_cpu}
"""The same, and the last resort."""


def _warn(name: str, attempt: str, failures: list[str]) -> None:
    if failures:
        warnings.warn(
            f"{name or 'a task matrix'}: decomposed by {attempt} ({'; '.join(failures)})",
            RuntimeWarning,
            stacklevel=3,
        )


def _needs_much_memory(M: Tensor) -> bool:
    """Say whether float64 on a card takes more than 1 GB and four times the size of M."""
    return SQUARES["cuda"] * min(M.shape) ** 2 > 10**9 + 4 * M.numel() * M.itemsize
