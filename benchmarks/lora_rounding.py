"""How much of a merged update is right when adapters are merged as full copies?

A full copy rounds ``P0 + scale B A`` to its type, and the difference to the base carries that
rounding: it is no longer of low rank, and its noise counts as features where it exceeds 1e-6 of
the largest one. The rival is the superposition of such copies; the reference is the one of the
factors, which is checked against float64 first. Printed is the relative error of the update M.

    python benchmarks/lora_rounding.py --json benchmarks/results/lora_rounding.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mergekit_stf.core import LowRank, superpose

SIZES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
TYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 1e-6


def updates(base: Tensor, size: float, tasks: int, rank: int) -> list[LowRank]:
    """Return random updates of this Frobenius norm, relative to the base's."""
    m, n = base.shape
    found = []
    for _ in range(tasks):
        left = torch.randn(m, rank, dtype=torch.float64)
        update = LowRank(left, torch.randn(rank, n, dtype=torch.float64))
        found.append(update.times(size * float(torch.linalg.norm(base)) / update.norm))
    return found


def exact(tasks: list[LowRank]) -> Tensor:
    """Return the superposition with the whole Gram matrix, in float64."""
    triples = [torch.linalg.svd(task.dense(), full_matrices=False) for task in tasks]
    k = tasks[0].rank
    U = torch.cat([U[:, :k] for U, _, _ in triples], dim=1)
    s = torch.cat([s[:k] for _, s, _ in triples])
    V = torch.cat([Vh[:k].T for _, _, Vh in triples], dim=1)
    return U * torch.linalg.solve((U.T @ U) * (V.T @ V), s) @ V.T


def error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


def row(base: Tensor, size: float, options: argparse.Namespace) -> dict[str, float]:
    tasks = updates(base, size, options.tasks, options.rank)
    expected = exact(tasks)
    result = {"size": size, "factors": error(superpose(tasks).M.dense(), expected)}
    if result["factors"] > TOLERANCE:
        raise SystemExit(f"factors are wrong by {result['factors']:.1e} at size {size}")
    for dtype in TYPES:
        stored = base.to(dtype)
        copies = [(stored.double() + task.dense()).to(dtype) for task in tasks]
        merged = superpose([copy.float() - stored.float() for copy in copies], source_dtype=dtype)
        result[str(dtype).removeprefix("torch.")] = error(merged.M, expected)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    base = 0.02 * torch.randn(options.side, options.side)
    print("|B A| / |P0|   factors   float32 copies   bfloat16 copies")
    rows = [row(base, size, options) for size in SIZES]
    for r in rows:
        print(f"{r['size']:12} {r['factors']:9.1e} {r['float32']:16.1e} {r['bfloat16']:17.1e}")
    if options.json:
        setting = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
