"""How much faster is a merge of adapters from their factors than one of full copies?

Both routes get the same recipe over ``base+adapter`` references and must write the same weights.
The rival is the host's own route with the same method and the same engine: each adapter is merged
into a float32 copy of the base (``ModelReference.merged``, which calls PEFT), then ``run_merge``
superposes the copies. Times are of one process after all imports, files in the page cache, and
include reading every input and writing the output; ours includes the fsync of its output, the
host's has none. ``copy`` is the floor of any route that writes a full model: read the base, write
it again. Beside wall clock stands the CPU time of the process. torch has one thread by default, in
both routes; ours computes and writes in two threads of its own, which its CPU time shows.

    python benchmarks/lora.py --rounds 3 --json benchmarks/results/lora.json
    python benchmarks/lora.py --rounds 3 --method wudi --json benchmarks/results/lora_wudi.json
    python benchmarks/lora.py --rounds 2 --threads 2 --json benchmarks/results/lora_two_threads.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tensor_writer import TensorWriter
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.lora import merge_to_adapter, merge_to_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-5
PIECES = {"factors": 3, "adapter": 3, "copy": 3, "copies": 1, "full": 1}
"""What is timed, and how often in a round."""


def make(root: Path, options: argparse.Namespace) -> str:
    """Write a base and its adapters; return the recipe."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        vocab_size=options.vocabulary,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for number in range(options.adapters):
        base = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        settings = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS)
        model = peft.get_peft_model(base, settings)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=options.size)
        model.save_pretrained(root / f"adapter{number}")
    base_path = str(root / "base")
    models = [{"model": f"{base_path}+{root}/adapter{n}"} for n in range(options.adapters)]
    return yaml.safe_dump(
        {"merge_method": options.method, "base_model": base_path, "models": models}
    )


class Routes:
    """The timed pieces of work; each returns the folder that it wrote."""

    def __init__(self, root: Path, text: str) -> None:
        self.root, self.text = root, text
        self.options = MergeOptions(
            quiet=True,
            write_model_card=False,
            copy_tokenizer=False,
            lora_merge_cache=str(root / "cache"),
            lora_merge_dtype="float32",
        )

    def factors(self) -> None:
        merge_to_model(check_recipe(self.text), self.root / "factors", self.options)

    def adapter(self) -> None:
        merge_to_adapter(check_recipe(self.text), self.root / "adapter", self.options)

    def copies(self) -> None:
        for entry in yaml.safe_load(self.text)["models"]:
            reference = ModelReference.parse(entry["model"])
            reference.merged(cache_dir=str(self.root / "cache"), lora_merge_dtype="float32")

    def full(self) -> None:
        config = MergeConfiguration.model_validate(yaml.safe_load(self.text))
        run_merge(config, str(self.root / "full"), self.options)

    def copy(self) -> None:
        loader = LazyTensorLoader.from_disk(str(self.root / "base"))
        writer = TensorWriter(str(self.root / "copy"))
        for name in loader.index.tensor_paths:
            writer.save_tensor(name, loader.get_tensor(name))
        writer.finalize()


def timed(work: Callable[[], None], written: Path) -> tuple[float, float]:
    """Return wall-clock and CPU seconds."""
    shutil.rmtree(written, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def check(root: Path) -> dict[str, float]:
    """Compare the two outputs with each other, and the adapter with the model.

    Raises:
        SystemExit: they differ by more than the tolerance, or are not the same weights.
    """
    base, ours, theirs = (load(root / name) for name in ("base", "factors", "full"))
    if set(ours) != set(theirs):
        raise SystemExit(f"different weights: {sorted(set(ours) ^ set(theirs))[:5]}")
    changed = [name for name in ours if not torch.equal(base[name], theirs[name])]
    worst = max(distance(ours[name], theirs[name]) for name in ours)
    update = max(distance(ours[n] - base[n], theirs[n] - base[n]) for n in changed)
    bare = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(bare, root / "adapter").merge_and_unload()
    of_adapter = max(distance(adapted.state_dict()[name], ours[name]) for name in changed)
    errors = {"weights": worst, "updates": update, "adapter": of_adapter}
    if max(worst, of_adapter) > TOLERANCE or len(changed) != len(base) - untouched(base):
        raise SystemExit(f"the routes do not agree: {errors}, {len(changed)} weights changed")
    return errors


def untouched(base: dict[str, torch.Tensor]) -> int:
    return sum(not any(target in name for target in TARGETS) for name in base)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


def imports(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def run(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    routes = Routes(root, make(root, options))
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, repeats in PIECES.items():
            written = root / ("cache" if name == "copies" else name)
            for _ in range(repeats):
                seconds = timed(getattr(routes, name), written)
                wall.setdefault(name, []).append(seconds[0])
                cpu.setdefault(name, []).append(seconds[1])
        wall.setdefault("imports", []).append(imports("mergekit_stf.cli.lora"))
        wall.setdefault("imports_host", []).append(imports("mergekit.scripts.run_yaml"))
    return {
        "errors": check(root),
        "wall": wall,
        "cpu": cpu,
        "ratios": {"wall": ratios(medians(wall)), "cpu": ratios(medians(cpu))},
        "setting": {key: value for key, value in vars(options).items() if key != "json"},
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
    }


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(median: dict[str, float]) -> dict[str, float]:
    """Return how many times slower the rival is."""
    ours, whole = median["factors"], median["copies"] + median["full"]
    found = {
        "model, against copies and their merge": whole / ours,
        "model, against the merge of copies that are there": median["full"] / ours,
        "model, against copies and their merge, less the floor": (whole - median["copy"])
        / (ours - median["copy"]),
        "adapter, against copies and their merge": whole / median["adapter"],
    }
    if "imports" in median:
        found["model, against copies and their merge, with imports"] = (
            whole + median["imports_host"]
        ) / (ours + median["imports"])
    return found


def show(result: dict[str, Any]) -> None:
    errors = ", ".join(f"{name} {value:.1e}" for name, value in result["errors"].items())
    print(f"answers agree, relative: {errors}")
    for kind in ("wall", "cpu"):
        for name, values in result[kind].items():
            spread = f"[{min(values):.2f}, {max(values):.2f}], {len(values)}"
            print(f"{kind:5} {name:13} {statistics.median(values):8.2f} s  {spread}")
        for name, ratio in result["ratios"][kind].items():
            print(f"{kind:5} {ratio:6.1f} x  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("hidden", 1024), ("inner", 2816), ("layers", 8), ("vocabulary", 8000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--method", default="stf", help="merge method, for both routes")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--size", type=float, default=0.005, help="standard deviation of B")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both routes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # PEFT and transformers
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
