"""The task matrices of one weight, ``M_i = w_i (P_i - P_0)``, whole or in factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from mergekit_stf.core.features.decompose import decompose
from mergekit_stf.core.features.features import Features, kept_rank
from mergekit_stf.core.low_rank import LowRank, sum_of
from mergekit_stf.core.pool import map_matrices, workers_for
from mergekit_stf.core.precision import length

PORTION, PORTION_ON_CARD = 2**14, 2**22
"""Entries of each task matrix in float64 at a time: what a cache holds, what is worth a launch."""


@dataclass
class TaskMatrices:
    """What a merge method is given of one weight, and what it may ask of it.

    Every question is answered when it is first asked, and what is answered is kept as long as this
    object is. Whole matrices are formed one at a time, and none is kept.

    Attributes:
        read: yields the task matrices, each (m, n), of float32 or float64, or in factors; called
            again whenever they are needed again, it yields the same ones.
        shape: (m, n).
        count: T, how many there are, at least one.
        device: where they are.
        dtype: of whole matrices, and of what is merged from them.
        factored: every task matrix is in factors, so that the merged matrix can be, too.
        source_dtype: type of the checkpoints that they were computed from; a coarse one allows
            quicker ways of computing that its rounding hides.
        name: of the weight, for warnings and errors.
        input_axis: the axis that is multiplied with the inputs: 1, and 0 where a layer stores its
            weight transposed, as GPT-2's do.
        squared_distances: ``|θ_i - θ_0|²`` of each model as a whole to the base, over all its
            weights, where the method asks for it.
    """

    read: Callable[[], Iterable[Tensor | LowRank]]
    shape: tuple[int, int]
    count: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    factored: bool = False
    source_dtype: torch.dtype = torch.float32
    name: str = ""
    input_axis: int = 1
    squared_distances: tuple[float, ...] = ()
    _features: dict[tuple[float, str], tuple[Features, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        matrices: Sequence[Tensor | LowRank],
        source_dtype: torch.dtype = torch.float32,
        name: str = "",
        input_axis: int = 1,
    ) -> TaskMatrices:
        """Return the task matrices of a weight that are all at hand.

        Raises:
            ValueError: there is none, or their shapes differ.
        """
        if not matrices:
            raise ValueError(f"{name or 'a merge'}: at least one task matrix is needed")
        shapes = sorted({(int(M.shape[0]), int(M.shape[1])) for M in matrices})
        if len(shapes) > 1:
            raise ValueError(f"{name or 'task matrices'}: shapes differ: {shapes}")
        whole = [M for M in matrices if isinstance(M, Tensor)]
        like = whole[0] if whole else matrices[0].left  # type: ignore[union-attr]
        return cls(
            read=lambda: iter(matrices),
            shape=shapes[0],
            count=len(matrices),
            device=like.device,
            dtype=like.dtype if whole else torch.float32,
            factored=not whole,
            source_dtype=source_dtype,
            name=name,
            input_axis=input_axis,
        )

    def matrices(self) -> Iterator[Tensor]:
        """Yield the task matrices as wholes, (m, n), formed one at a time."""
        for M in self.read():
            yield M.dense().to(self.dtype) if isinstance(M, LowRank) else M

    def formed(self) -> TaskMatrices:
        """Return the same, all formed and kept, for whoever needs them together or again."""
        kept = list(self.read() if self.factored else self.matrices())
        return replace(self, read=lambda: iter(kept), _features={})

    def features(self, rank: float = 1.0, route: str = "auto") -> tuple[Features, ...]:
        """Return the features of each task, all of one type; of rank 0 where its matrix is zero.

        Args:
            rank: leading features to keep, a fraction up to 1 or a count above 1.
            route: of the decomposition, ``auto`` or a key of ``features.decompose.ROUTES``.

        Raises:
            STFError: no driver decomposes one of them.
        """
        if (rank, route) not in self._features:
            count = kept_rank(self.shape, rank)
            work = partial(
                decompose, rank=rank, route=route, source_dtype=self.source_dtype, name=self.name
            )
            side = min(self.shape)
            workers = workers_for(side, self.count, self.device, leading=count < side)
            if self.factored or workers == 1:
                found = list(map(work, self.read()))
            else:
                found = map_matrices(work, self.read(), workers, self.device)
            dtype = torch.float64 if self.factored else self.dtype
            self._features[rank, route] = tuple(f.to(dtype) for f in found)
        return self._features[rank, route]

    def changed(
        self, change: Callable[[Tensor | LowRank], Tensor | LowRank], dtype: torch.dtype
    ) -> TaskMatrices:
        """Return the task matrices after a change, made whenever one is read; wholes of this type.

        The change keeps the shape, or transposes it.
        """
        return replace(self, read=lambda: map(change, self.read()), dtype=dtype, _features={})

    def total(self) -> Tensor | LowRank:
        """Return ``Σ M_i``, in factors where all task matrices are."""
        if self.factored:
            return sum_of([M for M in self.read() if isinstance(M, LowRank)])
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for M in self.matrices():
            total += M
        return total

    def norms(self) -> tuple[float, ...]:
        """Return ``|M_i|`` (Frobenius) of each task."""
        return tuple(M.norm if isinstance(M, LowRank) else length(M) for M in self.read())

    def cosines(self) -> Tensor:
        """Return ``⟨M_i, M_j⟩ / (|M_i| |M_j|)``, (T, T) in float64 on the CPU, 0 beside zeros.

        Every entry counts, none is sampled. All task matrices are in memory together meanwhile.
        """
        if self.factored:
            factors = [M for M in self.read() if isinstance(M, LowRank)]
            inner = torch.tensor(
                [[a.inner(b) for b in factors] for a in factors], dtype=torch.float64
            )
        else:
            whole = list(self.matrices())
            sizes = torch.tensor([[length(M) or 1.0] for M in whole]).to(self.device).double()
            inner = sizes.new_zeros(self.count, self.count)
            portion = PORTION_ON_CARD if sizes.is_cuda else PORTION
            for parts in zip(*(torch.split(M.reshape(-1), portion) for M in whole), strict=True):
                stack = torch.stack(parts).double() / sizes
                inner.addmm_(stack, stack.mT)
        lengths = inner.diagonal().clamp(min=0).sqrt()
        scale = torch.where(lengths > 0, lengths, 1.0)
        return (inner / torch.outer(scale, scale)).cpu()
