"""Algorithm 1 of the paper: superpose the features of all task matrices into one matrix."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_stf.core import half
from mergekit_stf.core.decompose import decompose
from mergekit_stf.core.features import Features
from mergekit_stf.core.gram import combine
from mergekit_stf.core.precision import full_precision, length
from mergekit_stf.core.solve import NOTHING, Solution, solve
from mergekit_stf.core.threads import over_tasks

SAMPLE = 2**18
"""Entries of a task matrix from which overlaps are estimated; smaller matrices are used whole."""

PORTION = 2**14
"""Entries of each sample that are held in float64 at a time."""


@dataclass(frozen=True)
class Report:
    """What was done to one weight.

    Attributes:
        shape: (m, n).
        routes: of the decomposition, one a task.
        ranks: features kept, one a task.
        spectra: singular values of each task at ``features.spectrum_ranks``.
        norms: ``|M_i|`` (Frobenius) of the kept features, one a task.
        merged_norm: ``|M|``.
        sum_norm: ``|Σ M_i|`` of the kept features, from the overlaps.
        overlaps: ``<M_i, M_j> / (|M_i| |M_j|)``, T rows of T.
        iterations, residual, converged, condition, energy, ridge, cutoff, precision: see
            ``Solution``.
        alpha_ratio: quantiles 0, 0.25, 0.5, 0.75, 1 of ``alpha_k / s_k``.
    """

    shape: tuple[int, int]
    routes: tuple[str, ...]
    ranks: tuple[int, ...]
    norms: tuple[float, ...]
    merged_norm: float
    sum_norm: float
    overlaps: tuple[tuple[float, ...], ...]
    iterations: int
    residual: float
    converged: bool
    condition: float
    energy: float
    ridge: float
    cutoff: float
    alpha_ratio: tuple[float, ...]
    spectra: tuple[tuple[float, ...], ...]
    precision: str


@dataclass(frozen=True)
class Superposition:
    """The merged task matrix ``M``, (m, n), and the report of its making."""

    M: Tensor
    report: Report


def superpose(
    matrices: Iterable[Tensor],
    *,
    rank: float = 1.0,
    ridge: float | None = None,
    route: str = "auto",
    source_dtype: torch.dtype = torch.float32,
    name: str = "",
) -> Superposition:
    """Merge task matrices so that each feature keeps its response (paper, Algorithm 1).

    ``M`` is the matrix of smallest Frobenius norm with ``u_kᵀ M v_k = s_k`` for every singular
    triple of every task matrix.

    Args:
        matrices: the task matrices ``w_i (P_i - P_0)``, each (m, n), float32 or float64, on one
            device. They are taken one by one, and none is kept; at most their sum is.
        rank: leading features of each task to keep, a fraction up to 1 or a count above 1.
        ridge: regularisation of the solve, relative to the unit diagonal of G; ``None`` gives the
            exact answer where the system is well posed and a damped one where it is not.
        route: decomposition to use, ``auto`` or a key of ``routes.ROUTES``.
        source_dtype: type of the checkpoints; bfloat16 allows a quicker decomposition and, on some
            processors, a quicker solve (``half``).
        name: of the weight, for warnings and errors.

    Raises:
        ValueError: there is no matrix, or their shapes differ.
        STFError: no driver decomposes one of them.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([2.0, 0.0]))
        >>> B = torch.diag(torch.tensor([0.0, 3.0]))
        >>> superpose([A, B]).M
        tensor([[2., 0.],
                [0., 3.]])
    """
    with full_precision(), torch.no_grad():
        return _superpose(matrices, rank, ridge, route, source_dtype, name)


def _superpose(
    matrices: Iterable[Tensor],
    rank: float,
    ridge: float | None,
    route: str,
    source_dtype: torch.dtype,
    name: str,
) -> Superposition:
    inputs = _Inputs(name, rough=ridge is None and source_dtype == torch.bfloat16, rank=rank)
    features = over_tasks(
        lambda M: decompose(M, rank, route, source_dtype, name), inputs.read(matrices), rank
    )
    if not features:
        raise ValueError(f"{name or 'superpose'}: at least one task matrix is needed")
    present = [f for f in features if f.rank]
    if not present:
        zero = inputs.samples[0].new_zeros(inputs.shape)
        return Superposition(zero, _report(features, None, zero, inputs.samples))
    solution = None if inputs.total is None else half.superposed(present, inputs.total)
    solution = solution or solve(present, ridge)
    if not solution.converged:
        warnings.warn(
            f"{name or 'a weight'}: the solve stopped at a relative residual of "
            f"{solution.residual:.1e} after {solution.iterations} steps; "
            "set `ridge: 0.01` for this weight, or `rank: 0.5`",
            RuntimeWarning,
            stacklevel=3,
        )
    M = combine(present, solution.alpha) if solution.M is None else solution.M
    return Superposition(M, _report(features, solution, M, inputs.samples))


class _Inputs:
    """What is kept of the task matrices, which are taken one by one.

    Attributes:
        shape: of each.
        samples: of each, at most ``SAMPLE`` entries, from which overlaps are estimated.
        total: the sum of all, (m, n), where ``half`` will want it; else None.
    """

    def __init__(self, name: str, *, rough: bool, rank: float) -> None:
        self.name, self.rough, self.rank = name, rough, rank
        self.shape: tuple[int, ...] = ()
        self.samples: list[Tensor] = []
        self.total: Tensor | None = None

    def read(self, matrices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the matrices.

        Raises:
            ValueError: their shapes differ.
        """
        for M in matrices:
            self.shape = self.shape or tuple(M.shape)
            if M.shape != self.shape:
                shapes = sorted({self.shape, tuple(M.shape)})
                raise ValueError(f"{self.name or 'task matrices'}: shapes differ: {shapes}")
            self.samples.append(M.reshape(-1)[:: max(1, M.numel() // SAMPLE)].clone())
            self._add(M)
            yield M

    def _add(self, M: Tensor) -> None:
        if self.total is not None:
            self.total += M
        elif len(self.samples) == 1 and self.rough and half.worthwhile(M, self.rank):
            self.total = M.clone()


def _report(
    features: list[Features], solution: Solution | None, M: Tensor, samples: list[Tensor]
) -> Report:
    lengths = [torch.linalg.vector_norm(f.s, dtype=torch.float64) for f in features]
    norms = torch.stack(lengths).cpu()
    overlaps = _overlaps(samples)
    return assembled_report(
        features,
        solution,
        shape=(M.shape[0], M.shape[1]),
        norms=norms,
        merged_norm=length(M),
        sum_norm=float((norms @ overlaps @ norms).clamp(min=0).sqrt()),
        overlaps=overlaps,
    )


def assembled_report(
    features: Sequence[Features],
    solution: Solution | None,
    *,
    shape: tuple[int, int],
    norms: Tensor,
    merged_norm: float,
    sum_norm: float,
    overlaps: Tensor,
) -> Report:
    """Return the report of a weight.

    Args:
        features: of each task, of rank 0 where its matrix is zero.
        solution: of the system, None where every task matrix is zero.
        shape: (m, n).
        norms: ``|M_i|``, (T,).
        merged_norm: ``|M|``.
        sum_norm: ``|Σ M_i|``.
        overlaps: cosines between the task matrices, (T, T).
    """
    found = solution or NOTHING
    s = torch.cat([f.s for f in features])
    ordered = (torch.cat(found.alpha) / s).sort().values if found.alpha else s
    return Report(
        shape=shape,
        routes=tuple(f.route for f in features),
        ranks=tuple(f.rank for f in features),
        spectra=tuple(f.spectrum for f in features),
        norms=tuple(norms.tolist()),
        merged_norm=merged_norm,
        sum_norm=sum_norm,
        overlaps=tuple(map(tuple, overlaps.tolist())),
        iterations=found.iterations,
        residual=found.residual,
        converged=found.converged,
        condition=found.condition,
        energy=found.energy,
        ridge=found.ridge,
        cutoff=found.cutoff,
        precision=found.precision,
        alpha_ratio=tuple(ordered[[i * (s.numel() - 1) // 4 for i in range(5)]].tolist())
        if found.alpha
        else (),
    )


def _overlaps(samples: list[Tensor]) -> Tensor:
    """Return the cosines between the sampled task matrices, (T, T), 0 for a zero matrix."""
    inner = samples[0].new_zeros(len(samples), len(samples), dtype=torch.float64)
    for parts in zip(*(torch.split(sample, PORTION) for sample in samples), strict=True):
        wide = torch.stack(parts).double()
        inner.addmm_(wide, wide.mT)
    lengths = inner.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return (inner / lengths / lengths.unsqueeze(1)).cpu()
