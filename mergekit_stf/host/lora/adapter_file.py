"""Write a merge of adapters as one adapter in PEFT's format."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.host.adapters.read import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from mergekit_stf.host.lora.jobs import AdapterJobs
from mergekit_stf.host.lora.plan import AdapterPlan, TouchedWeight
from mergekit_stf.host.lora.recipe import base_of
from mergekit_stf.host.merging.finite import round_weight
from mergekit_stf.host.merging.job import scale_of


@dataclass(frozen=True)
class Module:
    """One module of the written adapter.

    Attributes:
        name: its name in the model.
        rank: columns of its factors.
        dropped: Frobenius norm of what ``max_rank`` cut off.
        norm: Frobenius norm of the whole update.
    """

    name: str
    rank: int
    dropped: float
    norm: float

    @property
    def error(self) -> float:
        """Relative error of the update."""
        return self.dropped / self.norm if self.norm else 0.0


def write_adapter(
    jobs: AdapterJobs, config: MergeConfiguration, out: Path, max_rank: int | None = None
) -> list[Module]:
    """Write one LoRA adapter that changes the base as the merge does, lambda included.

    Its scale is 1 everywhere, its factors are float32 unless the recipe has ``dtype`` or
    ``out_dtype``, and a module's rank is the sum of the ranks of its updates.

    Args:
        jobs: merge what the adapters change.
        config: the recipe, for the base's name and the type of the factors.
        out: an existing directory.
        max_rank: the rank to which every larger module is truncated.

    Raises:
        STFError: a weight that no adapter can hold (a bias, a normalisation parameter), or a
            trimmed or replaced matrix without ``max_rank``.
    """
    dtype = dtype_from_name(config.out_dtype or config.dtype) or torch.float32
    tensors: dict[str, Tensor] = {}
    modules: list[Module] = []
    for stored, touched in jobs.plan.touched.items():
        matrix = _factors(jobs, stored, touched, max_rank)
        if matrix is None or not matrix.rank:
            continue
        module, matrix = _truncate_module(touched.name.removesuffix(".weight"), matrix, max_rank)
        modules.append(module)
        oriented = matrix.transposed if touched.transposed else matrix
        tensors.update(_tensors(module.name, oriented, touched.embedding, dtype))
    if not modules:
        raise STFError("the merge changes nothing, so there is no adapter to write")
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_config(_config(jobs.plan, base_of(config), modules), out / CONFIG_FILE)
    return modules


def total_error(modules: Sequence[Module]) -> float:
    """Return the relative Frobenius error of all updates together."""
    norm = math.hypot(*(module.norm for module in modules))
    return math.hypot(*(module.dropped for module in modules)) / norm if norm else 0.0


def _factors(
    jobs: AdapterJobs, stored: str, touched: TouchedWeight, max_rank: int | None
) -> LowRank | None:
    planned = touched.planned
    if len(planned.header.shape) != 2 or not touched.name.endswith(".weight"):
        raise STFError(f"{planned.name}: no adapter can hold it; write a full model instead")
    found = jobs.merge_matrix(stored)
    if found is None:
        return None
    job, merged = found
    M = merged.M
    if isinstance(M, Tensor):
        M = LowRank(M.double(), torch.eye(M.shape[1], dtype=torch.float64))
    delta = M.times(scale_of(job))
    if max_rank is not None or delta.rank <= _rank_sum(touched):
        return delta
    raise STFError(
        f"{planned.name}: its update by {planned.method} has rank {delta.rank} instead of "
        f"{_rank_sum(touched)} (density below 1, a split, a weight that is replaced as a whole, or "
        "a method that treats each entry by itself); give a maximal rank, or write a full model"
    )


def _rank_sum(touched: TouchedWeight) -> int:
    changes = [change for change in touched.changes if change is not None]
    return sum(0 if c.factors is None else c.factors.rank for c in changes)


def _truncate_module(name: str, matrix: LowRank, max_rank: int | None) -> tuple[Module, LowRank]:
    limit = min(*matrix.shape, max_rank or matrix.rank)
    if matrix.rank <= limit:
        return Module(name, matrix.rank, 0.0, matrix.norm), matrix
    short, dropped = truncate(matrix, limit)
    return Module(name, short.rank, dropped, matrix.norm), short


def truncate(matrix: LowRank, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation of at most this rank, and its error.

    Returns:
        the approximation (Eckart-Young), and the Frobenius norm of what was dropped.
    """
    U, s, Vh = matrix.svd()
    dropped = float(torch.linalg.vector_norm(s[rank:]))
    return LowRank(U[:, :rank] * s[:rank], Vh[:rank]), dropped


def _tensors(
    module: str, matrix: LowRank, embedding: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    A, B = ("lora_A.weight", "lora_B.weight")
    if embedding:
        A, B = ("lora_embedding_A", "lora_embedding_B")
    factors = {f"{PREFIX}{module}.{A}": matrix.right, f"{PREFIX}{module}.{B}": matrix.left}
    return {
        name: round_weight(name, factor, dtype).contiguous() for name, factor in factors.items()
    }


def _config(plan: AdapterPlan, base: ModelReference, modules: list[Module]) -> LoraConfig:
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    others = {f"^{re.escape(m.name)}": m.rank for m in modules if m.rank != rank}
    kinds = {adapter.config.task_type for adapter in plan.adapters}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=[module.name for module in modules],
        fan_in_fan_out=any(t.transposed and not t.embedding for t in plan.touched.values()),
        task_type=kinds.pop() if len(kinds) == 1 else None,
        base_model_name_or_path=base.model.path,
        revision=base.model.revision,
        inference_mode=True,
    )


def _write_config(config: LoraConfig, file: Path) -> None:
    """Write what PEFT would, with sets in order: PEFT's own order differs from run to run."""
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
