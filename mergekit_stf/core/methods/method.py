"""What a merge method is: one object that turns the task matrices of a weight into one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_stf.core.features.features import Features, combine
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods.options import CALIBRATE, Option
from mergekit_stf.core.precision import length
from mergekit_stf.core.record import Record
from mergekit_stf.core.task_matrices import TaskMatrices


class Kind(str, Enum):
    """What a weight is in its model."""

    LINEAR = "linear map"
    TABLE = "table"
    NORMALISATION = "normalisation"
    VECTOR = "vector"


MERGE, SUM, MEAN, BASE = "merge", "sum", "mean", "base"
"""Rules: the method's own way, ``Σ M_i`` times lambda, the mean of M_i, and the base as it is."""

PAPER_RULES: Mapping[Kind, str] = {
    Kind.LINEAR: MERGE,
    Kind.TABLE: SUM,
    Kind.NORMALISATION: MEAN,
    Kind.VECTOR: SUM,
}
"""Algorithm 2 of the STF paper: what is no linear map is added up, normalisations are averaged."""

LINEAR_ONLY_RULES: Mapping[Kind, str] = MappingProxyType(
    {kind: MERGE if kind == Kind.LINEAR else MEAN for kind in Kind}
)
"""Of methods that merge linear maps and average everything else."""

ALL_RULES: Mapping[Kind, str] = MappingProxyType(dict.fromkeys(Kind, MERGE))
"""Of methods that merge weights of every kind."""


@dataclass(frozen=True)
class Merged:
    """What a method makes of one weight.

    Attributes:
        M: the merged task matrix, (m, n), without lambda; in factors where the tasks are.
        record: what was done, as far as the method knows it.
        features: the singular triples of M, where the method knows them better than M does: of
            equal singular values, the vectors are not determined by the matrix.
    """

    M: Tensor | LowRank
    record: Record
    features: Features | None = None


class Method(ABC):
    """A merge method.

    A subclass is registered with ``mergekit_stf.core.methods.register``; nothing else has to know
    of it.

    Attributes:
        name: as in ``merge_method:``.
        title: for a person.
        reference: paper, arXiv number, equation.
        url: of the paper.
        options: the method's own, besides ``weight``, ``density``, ``lambda``, ``rule`` and
            ``split``, which every method has.
        default_lambda: ``lambda`` where the recipe gives none.
        default_density: ``density`` where the recipe gives none.
        rules: what each kind of weight gets.
        elementwise: the method treats every entry by itself, so that it merges weights of any
            shape: what is no linear map comes whole, as a matrix of its first axis and the rest.
        sided: the method treats inputs and outputs of a linear map differently.
        whole_models: the method asks for ``TaskMatrices.squared_distances``, for which all models
            are read once before the first weight is merged.
        own_rule: what the method's own rule is called in recipes and tables.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    url: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    default_lambda: ClassVar[float] = 1.0
    default_density: ClassVar[float] = 1.0
    rules: ClassVar[Mapping[Kind, str]] = PAPER_RULES
    elementwise: ClassVar[bool] = False
    sided: ClassVar[bool] = False
    whole_models: ClassVar[bool] = False
    own_rule: ClassVar[str] = MERGE

    def knows_sides(self, options: Mapping[str, Any]) -> bool:
        """Say whether the answer changes where inputs and outputs of a linear map are swapped."""
        return self.sided or bool(options.get(CALIBRATE.name))

    def takes_whole(self, kind: Kind) -> bool:
        """Say whether a weight of this kind is merged as one, whatever its shape."""
        return self.elementwise and kind != Kind.LINEAR

    @abstractmethod
    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge the task matrices of one linear map.

        Args:
            tasks: the task matrices.
            options: a value for each of ``options``.

        Raises:
            STFError: what is wrong with this weight, by its name, and what to do.
        """


def describe(
    tasks: TaskMatrices,
    M: Tensor | LowRank,
    features: Sequence[Features] = (),
    cosines: Tensor | None = None,
    **facts: Any,
) -> Record:
    """Return the record of a merge that used these features, or none.

    Args:
        tasks: the task matrices.
        M: the merged matrix.
        features: of each task; lengths are then those of the kept features.
        cosines: between the task matrices, (T, T), where the method has them already.
        facts: further fields of the record.
    """
    cosines = tasks.cosines() if cosines is None else cosines
    norms = tuple(f.norm for f in features) if features else tasks.norms()
    largest = max(norms) or 1.0
    sizes = torch.tensor(norms, dtype=torch.float64) / largest
    return Record(
        routes=tuple(f.route for f in features),
        kept=tuple(f.rank for f in features),
        spectra=tuple(f.spectrum for f in features),
        norms=norms,
        norm_sum=largest * float((sizes @ cosines @ sizes).clamp(min=0).sqrt()),
        norm_merged=M.norm if isinstance(M, LowRank) else length(M),
        cosine=tuple(map(tuple, cosines.tolist())),
        **facts,
    )


def combined(
    tasks: TaskMatrices, features: Sequence[Features], alpha: Sequence[Tensor]
) -> Tensor | LowRank:
    """Return ``M = Σ_k alpha_k u_k v_kᵀ`` (equation 2), in factors where the tasks are.

    Args:
        tasks: the task matrices.
        features: of each task; of rank 0 where it has none.
        alpha: the weights of each task's features, (r_i,).
    """
    if not tasks.factored:
        return combine(features, alpha)
    scaled = [f.U * a for f, a in zip(features, alpha, strict=True)]
    return LowRank(torch.cat(scaled, dim=1), torch.cat([f.Vh for f in features]))
