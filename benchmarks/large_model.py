"""Does a sharded bfloat16 Llama of a gigabyte pass through every command, and in how much memory?

A base and two tuned models of random weights are written as a hub's cache holds them: shards, and
links into a folder of blobs. Then ``plan``, ``merge`` (killed in the middle), ``merge`` again,
``verify``, ``sweep`` and ``report`` run as processes of their own; times and peak memory are
printed, and the merged model is compared with that of an uninterrupted merge, byte for byte.

    python benchmarks/large_model.py --json benchmarks/results/large_model.json
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import parser, peak_of, write
from safetensors.torch import save_file

SIZES = {
    "full": {"hidden": 1024, "inner": 2816, "layers": 16, "vocabulary": 160_000},
    "tiny": {"hidden": 64, "inner": 96, "layers": 2, "vocabulary": 500},
}
SHARD = {"full": 200 * 10**6, "tiny": 10**5}
"""Bytes of weights in a file."""


def config(size: dict[str, int]) -> dict[str, Any]:
    """Return the configuration of a Llama of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["hidden"] // 32,
        "num_key_value_heads": size["hidden"] // 32,
        "head_dim": 32,
        "vocab_size": size["vocabulary"],
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight."""
    h, i, v = size["hidden"], size["inner"], size["vocabulary"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in range(size["layers"]):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{k}_proj.weight": (h, h) for k in "qkvo"}
        found |= {f"{at}mlp.{k}_proj.weight": (i, h) for k in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (h, i)
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{at}{norm}.weight": (h,) for norm in norms}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


def write_model(root: Path, name: str, size: dict[str, int], limit: int, seed: int) -> Path:
    """Write a model as the hub's cache holds it; the base has the seed 0, others differ from it."""
    blobs, snapshot = root / f"blobs-{name}", root / name
    blobs.mkdir(parents=True)
    snapshot.mkdir()
    places: dict[str, str] = {}
    parts, numbers = shards(size, limit), itertools.count()
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {weight: values(shape, next(numbers), seed) for weight, shape in part.items()}
        save_file(tensors, blobs / f"{number:064x}", {"format": "pt"})
        (snapshot / file).symlink_to(Path("..") / blobs.name / f"{number:064x}")
        places |= dict.fromkeys(part, file)
    total = sum(2 * math.prod(shape) for part in parts for shape in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "config.json").write_text(json.dumps(config(size)))
    return snapshot


def shards(size: dict[str, int], limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Share the weights out to files of so many bytes at most."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for weight, shape in shapes(size).items():
        filled = sum(2 * math.prod(other) for other in parts[-1].values())
        if parts[-1] and filled + 2 * math.prod(shape) > limit:
            parts.append({})
        parts[-1][weight] = shape
    return parts


def values(shape: tuple[int, ...], number: int, seed: int) -> torch.Tensor:
    """Return the weight of that number, of the base for the seed 0, else of a tuned model."""
    x = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
    if seed:
        generator = torch.Generator().manual_seed(10_000 * seed + number)
        x += 0.002 * torch.randn(shape, generator=generator)
    return x.bfloat16()


def digest(folder: Path) -> str:
    """Return one digest of all weights in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def run(figures: dict[str, Any], what: str, *arguments: object) -> None:
    """Run a command to its end, which must be good, and note its time and peak memory."""
    command = [sys.executable, "-m", "mergekit_stf", *map(str, arguments)]
    seconds, peak = peak_of(command)
    figures[what] = {"seconds": seconds, "peak bytes": peak}
    print(f"{what}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB", flush=True)


def kill_in_the_middle(figures: dict[str, Any], recipe: Path, out: Path, entries: int) -> None:
    """Start a merge and kill it once so many matrices are stored."""
    command = [sys.executable, "-m", "mergekit_stf", "merge", str(recipe), str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    store = out.with_name(f"{out.name}.stf-work") / "store"
    while process.poll() is None and len([*store.glob("[0-9a-f]*.safetensors")]) < entries:
        time.sleep(0.05)
    assert process.poll() is None, "the merge ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    figures["killed after"] = {"seconds": time.perf_counter() - started, "matrices": entries}
    print(f"killed with {entries} matrices stored", flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="full")
    options.add_argument("--folder", type=Path, help="where to work; it is kept")
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    root = given.folder or Path(tempfile.mkdtemp(prefix="large-model-"))
    size, limit = SIZES[given.size], SHARD[given.size]
    base, *tuned = (
        write_model(root, name, size, limit, seed) for seed, name in enumerate(("base", "a", "b"))
    )
    stored = sum(path.stat().st_size for path in base.iterdir())
    figures: dict[str, Any] = {"bytes of a model": stored}
    print(f"{stored / 1e9:.2f} GB a model in {len([*base.glob('*.safetensors')])} shards")
    recipe = root / "recipe.yml"
    models = "".join(f"  - model: {path}\n" for path in tuned)
    recipe.write_text(
        f"merge_method: stf\nbase_model: {base}\nmodels:\n{models}"
        "dtype: float32\nout_dtype: bfloat16\n"
    )
    run(figures, "plan", "plan", recipe)
    run(figures, "merge, whole", "merge", recipe, root / "whole", "--quiet")
    weights = size["layers"] * 7
    kill_in_the_middle(figures, recipe, root / "resumed", weights // 2)
    run(figures, "merge, resumed", "merge", recipe, root / "resumed", "--quiet")
    assert digest(root / "whole") == digest(root / "resumed"), "the resumed merge has other bytes"
    run(figures, "verify", "verify", root / "resumed")
    run(figures, "sweep of two", "sweep", recipe, root / "sweep", "--lambda", "0.5,1", "--quiet")
    run(figures, "report", "report", root / "whole", "--sample", "4", "--quiet")
    assert (root / "whole" / "stf-report.html").stat().st_size > 10_000
    if given.folder is None:
        shutil.rmtree(root)
    write(given.json, figures)


if __name__ == "__main__":
    main()
