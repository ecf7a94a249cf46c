"""What might be a better default: variants of ``wudi``, as a method of the bench alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.candidates import Candidate
from mergekit_stf.core import methods
from mergekit_stf.core.methods import Kind, Merged, Method, Option, describe
from mergekit_stf.core.methods.options import number
from mergekit_stf.core.methods.wudi import prior_scale
from mergekit_stf.core.task_matrices import TaskMatrices

LAMBDA_ONE = (0.8, 1.0, 1.2)
"""Enough to see whether a variant moves the best lambda."""


def text(value: object) -> str:
    """Return a word."""
    return str(value)


class Lead(Method):
    """``wudi`` with a free weighting, prior, trimming of the inputs, spectrum and side.

    ``w_i = |M_i|^-exponent``; ``C_i`` from the leading ``trimmed`` share of the features; the
    answer's singular values to the power ``power``, its Frobenius norm kept; ``side`` the inputs,
    the outputs, or the mean of both answers.
    """

    name = "lead"
    title = "a variant of wudi"
    reference = "the bench"
    options = (
        Option("ridge", 0.3, number, "as of wudi"),
        Option("prior", "matched", text, "sum, matched, mean, none, stf or tsv_m"),
        Option("exponent", 2.0, number, "of the length in the weighting"),
        Option("trimmed", 1.0, number, "share of features in the projectors"),
        Option("power", 1.0, number, "of the answer's spectrum"),
        Option("side", "inputs", text, "inputs, outputs or both"),
    )

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        """Merge one linear map of whole task matrices."""
        matrices = [M for M in tasks.matrices() if M.any()]
        P = _prior(tasks, matrices, options["prior"])
        answers = []
        if options["side"] in ("inputs", "both"):
            answers.append(_closed(matrices, P, options))
        if options["side"] in ("outputs", "both"):
            answers.append(_closed([M.mT for M in matrices], P.mT, options).mT)
        M = sum(answers) / len(answers)
        if options["power"] != 1:
            U, s, Vh = torch.linalg.svd(M, full_matrices=False)
            flat = s ** options["power"]
            M = (U * (flat * s.norm() / flat.norm())) @ Vh
        return Merged(M, describe(tasks, M))


def _prior(tasks: TaskMatrices, matrices: list[Tensor], name: str) -> Tensor:
    if methods.is_known(name):
        method = methods.get(name)
        given = {option.name: option.default for option in method.options}
        return method.merge(tasks, given).M
    S = sum(matrices)
    squares = float(sum(M.square().sum() for M in matrices))
    return prior_scale(name, squares, float(S.square().sum()), len(matrices)) * S


def _closed(matrices: list[Tensor], P: Tensor, options: Mapping[str, Any]) -> Tensor:
    n = P.shape[1]
    A, B = torch.zeros(n, n).to(P), torch.zeros_like(P)
    for M in matrices:
        C = M.mT @ M
        if options["trimmed"] < 1:
            values, Q = torch.linalg.eigh(C)
            kept = values.numel() - round(options["trimmed"] * min(M.shape))
            C = (Q[:, kept:] * values[kept:]) @ Q[:, kept:].mT
        w = M.norm() ** -options["exponent"]
        A += w * C
        B += w * M @ C
    mu = options["ridge"] * A.diagonal().mean()
    A.diagonal().add_(mu)
    return torch.linalg.solve(A, B + mu * P, left=False)


def _wudi(label: str, options: Mapping[str, Any] = MappingProxyType({}), **given: Any) -> Candidate:
    """Return ``wudi`` with options of its own, or other fields of a candidate."""
    return Candidate(label, "wudi", options, scales=LAMBDA_ONE, **given)


def _lead(label: str, **options: Any) -> Candidate:
    return Candidate(label, Lead.name, options, scales=LAMBDA_ONE)


def _ruled(label: str, kind: Kind, rule: str, factor: float = 1.0) -> Candidate:
    return _wudi(label, rules={kind: rule}, factors={kind: factor})


LEADS = (
    *(_wudi(f"ridge {ridge:g}", {"ridge": ridge}) for ridge in (0.03, 0.1, 1.0, 3.0)),
    *(_wudi(f"prior {prior}", {"prior": prior}) for prior in ("sum", "mean", "none")),
    *(_lead(f"prior {prior}", prior=prior) for prior in ("stf", "tsv_m")),
    *(_lead(f"spectrum^{power:g}", power=power) for power in (0.75, 0.5)),
    *(_lead(f"weights |M|^-{exponent:g}", exponent=exponent) for exponent in (0.0, 1.0, 3.0)),
    *(_lead(f"projectors {share:g}", trimmed=share) for share in (0.5, 0.25)),
    *(_lead(f"side {side}", side=side) for side in ("outputs", "both")),
    _ruled("tables by wudi", Kind.TABLE, "merge"),
    _ruled("tables averaged", Kind.TABLE, "mean"),
    _ruled("tables summed, 1.5 times", Kind.TABLE, "sum", 1.5),
    _ruled("tables of the base", Kind.TABLE, "base"),
    _ruled("normalisations summed", Kind.NORMALISATION, "sum"),
    _ruled("vectors averaged", Kind.VECTOR, "mean"),
    *(_wudi(f"density {density:g}", density=density) for density in (0.5, 0.2)),
    *(_wudi(f"depth {a:g} to {b:g}", depth=(a, b)) for a, b in ((0.8, 1.2), (1.2, 0.8))),
)
