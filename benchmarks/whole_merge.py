"""How long does a whole merge take beside the host's own methods?

A Llama of 119 million parameters (hidden 1024, intermediate 2816, 8 layers, vocabulary 8000) in
bfloat16, a base and three tuned copies, merged by the real command in processes of its own, methods
in turn: ours, ``ties``, ``task_arithmetic``, and the straightforward implementation of ``stf``,
registered with the host from this file and trimming with the host's own ``sparsify``. Every method
gets the same recipe with one word changed; what ours write is method_points with float64 first.

    python benchmarks/whole_merge.py --json benchmarks/results/whole_merge.json
    python benchmarks/whole_merge.py --method wudi tsv_m iso_c --rivals ties \
        --json benchmarks/results/whole_merge_methods.json

With ``--device cuda`` every method gets the host's ``--cuda``, and the models are made on the card.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import (
    Run,
    distance,
    finish,
    judge,
    measured,
    parser,
    references,
    shown,
    spread,
    straightforward,
)
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from mergekit.merge_methods.registry import register
from mergekit.scripts.run_yaml import main as mergekit_yaml
from mergekit.sparsify import SparsificationMethod, sparsify
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_stf.core import methods, trim
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.merging.kinds import kind_for

RIVALS = ("ties", "task_arithmetic", "straightforward")

MODEL = {"hidden": 1024, "inner": 2816, "layers": 8, "vocabulary": 8000}
"""The Llama of 119 million parameters."""

BOUNDS = {
    "stf": {"ties": 2.0, "straightforward": 1 / 3},
    "wudi": {"ties": 0.8},
    "tsv_m": {"ties": 2.0},
    "iso_c": {"ties": 2.0},
}
"""What a method may take of another method's time, for that model on a CPU."""


def make(root: Path, given: argparse.Namespace) -> None:
    """Write a base and tuned copies whose deltas have a shared and a decaying part."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_hidden_layers=given.layers,
        num_attention_heads=16,
        vocab_size=given.vocabulary,
    )
    base = LlamaForCausalLM(config).bfloat16().to(given.device)
    base.save_pretrained(root / "base")
    for number in range(3):
        tuned = LlamaForCausalLM(config).bfloat16().to(given.device)
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in tuned.parameters():
                noise = 0.002 * torch.randn(p.shape, device=p.device)
                p.copy_(p.float() + noise + low_rank(p.shape, given.device))
        tuned.save_pretrained(root / f"tuned{number}")


def low_rank(shape: torch.Size, device: str) -> torch.Tensor:
    """Return a strong part of rank 32 for matrices, zero for the rest."""
    if len(shape) != 2:
        return torch.zeros(shape, device=device)
    A, B = (torch.randn(size, device=device) for size in ((shape[0], 32), (32, shape[1])))
    return 0.001 * A @ B / 32**0.5


def recipe(root: Path, method: str, density: float) -> Path:
    """Write the same recipe for each method, with one word changed."""
    models = [
        {"model": str(root / f"tuned{n}"), "parameters": {"weight": 1.0, "density": density}}
        for n in range(3)
    ]
    settings = {"merge_method": method, "base_model": str(root / "base"), "models": models}
    settings["dtype"] = "bfloat16"
    path = root / f"{method}.yml"
    path.write_text(yaml.safe_dump(settings))
    return path


def check(root: Path, method: str, density: float) -> float:
    """Compare the written M of one weight with float64, relative to the change by rounding."""
    name = "model.layers.0.self_attn.k_proj.weight"
    base, out = (
        load_file(root / d / "model.safetensors")[name].double() for d in ("base", f"out-{method}")
    )
    tuned = [load_file(root / f"tuned{n}/model.safetensors")[name].double() for n in range(3)]
    assert kind_for(name, base.shape, None) == Kind.LINEAR
    M = references()[method]([trim((P - base).float(), density) for P in tuned])
    expected = base + methods.get(method).default_lambda * M
    error = float((out - expected).abs().max() / expected.abs().max())
    assert error <= 2**-8, error
    return distance(out - base, expected - base)


def run_with_rival(density: str) -> None:
    """Be ``mergekit-yaml`` with the straightforward implementation registered."""

    @merge_method(name="straightforward")
    def rival(group: TensorGroup) -> torch.Tensor:
        base = group.base.tensor
        deltas = [
            sparsify(
                entry.tensor.float() - base.float(), float(density), SparsificationMethod.magnitude
            )
            for entry in group.non_base
        ]
        M = straightforward(deltas) if base.ndim == 2 and base.shape[0] != 8000 else sum(deltas)
        return (base.float() + 0.8 * M).to(base.dtype)

    register(rival)
    sys.argv = ["mergekit-yaml", *sys.argv[3:]]
    mergekit_yaml()


def command(root: Path, method: str, density: float, device: str) -> list[str]:
    """Return the command that merges with one method."""
    arguments = [
        str(recipe(root, method, density)),
        str(root / f"out-{method}"),
        "--quiet",
        "--no-copy-tokenizer",
        *(["--cuda"] if device.startswith("cuda") else []),
    ]
    if method == "straightforward":
        return [sys.executable, __file__, "--as-rival", str(density), *arguments]
    return [str(Path(sys.executable).with_name("mergekit-yaml")), *arguments]


def main() -> None:
    if sys.argv[1:2] == ["--as-rival"]:
        run_with_rival(sys.argv[2])
        return
    options = parser(__doc__)
    for name, default in MODEL.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--density", type=float, default=0.2)
    options.add_argument("--method", nargs="+", choices=BOUNDS, default=["stf"])
    options.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS)
    options.add_argument("--rival-runs", type=int, default=1)
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    runs: dict[str, list[Run]] = {name: [] for name in (*given.method, *given.rivals)}
    figures: dict[str, Any] = {"density": given.density, "apart": {}, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, given)
        for run in range(given.runs):
            for method in runs:
                if method == "straightforward" and run >= given.rival_runs:
                    continue
                runs[method].append(measured(command(root, method, given.density, given.device)))
                if run == 0 and method in given.method:
                    figures["apart"][method] = apart = check(root, method, given.density)
                    print(f"{method}: {apart:.1e} from float64, bfloat16's rounding included")
    for method, found in runs.items():
        figures[method] = {
            "time": spread([run.seconds for run in found]),
            "time of all threads": spread([run.cpu for run in found]),
            "peak GB": spread([run.peak / 1e9 for run in found]),
        }
        print(f"{method}:", ", ".join(f"{k} {shown(v, '')}" for k, v in figures[method].items()))
    for method in given.method:
        for rival in given.rivals:
            compare_with(figures, method, rival, runs, given)
    finish(given, figures)


def compare_with(
    figures: dict[str, Any],
    method: str,
    rival: str,
    runs: dict[str, list[Run]],
    given: argparse.Namespace,
) -> None:
    """Print what a method of ours takes of a rival's time, run by run, and judge it.

    The time of all threads is beside it, since on a busy machine it varies less.
    """
    pairs = list(zip(runs[method], runs[rival], strict=False))
    ratio = spread([ours.seconds / other.seconds for ours, other in pairs])
    threads = spread([ours.cpu / other.cpu for ours, other in pairs])
    figures[method] |= {f"over {rival}": ratio, f"over {rival}, all threads": threads}
    print(f"{method} over {rival}: {shown(ratio, 'x')}, of all threads {shown(threads, 'x')}")
    usual = given.device == "cpu" and all(getattr(given, n) == size for n, size in MODEL.items())
    if usual and rival in BOUNDS[method]:
        bound = BOUNDS[method][rival]
        judge(figures, f"{method} over {rival}", ratio["median"], "at most", bound)


if __name__ == "__main__":
    main()
