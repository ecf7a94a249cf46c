"""The features of one task matrix: choose a route, reduce the matrix, survive a failing driver."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features import Features, kept_rank
from mergekit_stf.core.precision import by_power, far_exponent
from mergekit_stf.core.routes import ROUTES, svd
from mergekit_stf.core.threads import CARD_SQUARES, alone
from mergekit_stf.core.truncated import leading, low_rank

FLOAT64_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
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
    if has_float64(M.device) and not (M.device.type == "cuda" and _needs_much(M)):
        return "gram_float64"
    return "gram_refined"


def _needs_much(M: Tensor) -> bool:
    """Say whether float64 on a card takes more than 1 GB and four times the size of M."""
    return CARD_SQUARES * min(M.shape) ** 2 > 10**9 + 4 * M.numel() * M.itemsize


def has_float64(device: torch.device) -> bool:
    """Say whether float64 runs at half the rate of float32 or so: CPUs and data-centre cards."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.cuda.get_device_capability(device) in FLOAT64_CAPABILITIES


def decompose(
    M: Tensor,
    rank: float = 1.0,
    route: str = "auto",
    source_dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Features:
    """Return the task-specific features of a task matrix (paper, section 3.2).

    Args:
        M: (m, n), float32 or float64, finite.
        rank: leading features to keep, a fraction up to 1 or a count above 1.
        route: a key of ``ROUTES``, or ``auto``.
        source_dtype: type of the checkpoints that ``M`` was computed from.
        name: of the weight, for warnings.

    Returns:
        At most ``min(m, n)`` features with ``s_k > 1e-6 s_1``; none of a zero matrix.

    Raises:
        STFError: no driver decomposes the matrix, float64 on the CPU included.
    """
    if M.shape[0] < M.shape[1]:
        return decompose(M.mT, rank, route, source_dtype, name).transposed
    if exponent := far_exponent(M):
        near = by_power(M, -exponent)
        return decompose(near, rank, route, source_dtype, name).times_power(exponent)
    count = kept_rank((M.shape[0], M.shape[1]), rank)
    rows, columns = _occupied(M, 1), _occupied(M, 0)
    if bool(rows.all() & columns.all()):
        return _attempt(M, count, route, source_dtype, name).leading(count)
    if not bool(columns.any()):
        empty = M.new_zeros(0)
        return Features(M[:, :0], empty, M[:0], "zero")
    core = decompose(M[rows][:, columns], count if count > 1 else rank, route, source_dtype, name)
    return _spread(core, rows, columns).leading(count)


def _shortcut(M: Tensor, count: int) -> Features | None:
    """Compute only what is kept, or only what is there, where that is quicker."""
    if M.dtype == torch.float64:
        return None
    return low_rank(M) or (leading(M, count) if count < M.shape[1] else None)


def _occupied(M: Tensor, dim: int) -> Tensor:
    """Say of each row (``dim`` 1) or column (``dim`` 0) whether it has a nonzero entry."""
    return (torch.amax(M, dim) != 0) | (torch.amin(M, dim) != 0)


def _spread(core: Features, rows: Tensor, columns: Tensor) -> Features:
    """Put zero rows and columns back into the features of a matrix without them."""
    U = core.U.new_zeros(rows.numel(), core.rank)
    Vh = core.Vh.new_zeros(core.rank, columns.numel())
    U[rows] = core.U
    Vh[:, columns] = core.Vh
    return Features(U, core.s, Vh, core.route)


def _attempt(M: Tensor, count: int, route: str, source_dtype: torch.dtype, name: str) -> Features:
    """Try a shortcut, the route, the library's SVD, float64 on the CPU, with one warning."""
    drivers: dict[str, Callable[[Tensor], Features | None]] = dict(ROUTES)
    drivers |= {"shortcut": lambda M: _shortcut(M, count), "cpu": _on_cpu}
    chosen = ("shortcut", choose_route(M, source_dtype)) if route == "auto" else (route,)
    failures: list[str] = []
    for attempt in dict.fromkeys((*chosen, "svd", "cpu")):
        try:
            with nullcontext() if attempt == "shortcut" else alone(M):
                found = drivers[attempt](M)
        except RuntimeError as error:
            failures.append(f"{attempt}: {str(error).splitlines()[0]}")
            continue
        if found is None:
            continue
        if not (found.rank and bool(torch.isfinite(found.s).all())):
            failures.append(f"{attempt}: result is not finite")
            continue
        if failures:
            warnings.warn(
                f"{name or 'a task matrix'}: decomposed by {attempt} ({'; '.join(failures)})",
                RuntimeWarning,
                stacklevel=2,
            )
        return found
    raise STFError(
        f"{name or 'a task matrix'}: no driver decomposes it ({'; '.join(failures)}); look for "
        "extreme values in this weight, or set `rule: sum` for it"
    )


def _on_cpu(M: Tensor) -> Features:
    found = svd(M.double().cpu())
    U, s, Vh = (x.to(M) for x in (found.U, found.s, found.Vh))
    return Features(U, s, Vh, "svd_float64_cpu")
