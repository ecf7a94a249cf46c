"""Table 4: time of a merge in memory, on the trained models and on wider random ones."""

from __future__ import annotations

import time
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts

from benchmarks.paper.common import StateDict, Study, main

METHODS = ("linear", "task_arithmetic", "ties", "stf")
WIDTHS = (256, 512)
LAYERS = 4


def measure(study: Study) -> list[dict[str, Any]]:
    models = [("trained", study.base, study.tuned)]
    if study.seed == 0:
        models += [(f"width {width}", *random_models(width)) for width in WIDTHS]
    return [
        {"model": f"{name}, {millions(base):.1f} M", "tasks": len(tuned), **times(base, tuned)}
        for name, base, tuned in models
    ]


def millions(weights: StateDict) -> float:
    return sum(x.numel() for x in weights.values()) / 1e6


def random_models(width: int) -> tuple[StateDict, dict[str, StateDict]]:
    """Return the linear maps of a Llama and of three tuned ones, with a shared part."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"self_attn.q_proj": (width, width), "mlp.up_proj": (3 * width, width)}
    shapes |= {"self_attn.o_proj": (width, width), "mlp.down_proj": (width, 3 * width)}
    names = {f"layers.{i}.{name}.weight": s for i in range(LAYERS) for name, s in shapes.items()}

    def like(scale: float) -> StateDict:
        return {n: scale * torch.randn(s, generator=generator) for n, s in names.items()}

    base, shared = like(1.0), like(0.01)
    tuned = {}
    for task in range(3):
        own = like(0.02)
        tuned[f"task {task}"] = {n: base[n] + shared[n] + own[n] for n in names}
    return base, tuned


def times(base: StateDict, tuned: dict[str, StateDict]) -> dict[str, float]:
    return {method: seconds(method, base, tuned) for method in METHODS}


def seconds(method: str, base: StateDict, tuned: dict[str, StateDict]) -> float:
    """Return the best of three, after the shapes of the result were checked."""
    models = tuned if method == "linear" else {"base": base, **tuned}
    parameters = {"weight": 1.0} if method == "linear" else {"weight": 1.0, "density": 0.5}
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        merged = merge_state_dicts(
            models, method, parameters=parameters, base=None if method == "linear" else "base"
        )
        spent.append(time.perf_counter() - start)
    if any(merged[name].shape != P.shape for name, P in base.items()):
        raise AssertionError(f"{method} lost a weight")
    return min(spent)


if __name__ == "__main__":
    main("timing", measure)
