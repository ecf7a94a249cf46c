"""How much memory does the driver of a cluster take for an output of 4 GB, beside one process?

A base and two tuned models of random weights in bfloat16, in shards. Their differences are summed
(``rule: sum``), so that nothing waits for decompositions and weights come as fast as they can.

    python benchmarks/cluster_memory.py --json benchmarks/results/cluster_memory.json
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster import WAYS, command
from harness import finish, judge, parser, peak_of
from large_model import digest, write_model

SIZES = {
    "full": {"hidden": 2048, "inner": 8192, "layers": 30, "vocabulary": 8000},
    "gigabyte": {"hidden": 1024, "inner": 4096, "layers": 30, "vocabulary": 8000},
    "tiny": {"hidden": 64, "inner": 96, "layers": 2, "vocabulary": 500},
}
SHARD = 10**9
MORE = 1.0
"""GB by which the driver's peak may be above that of one process."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=SIZES, default="full")
    given = options.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, *tuned = (
            write_model(root, name, SIZES[given.size], SHARD, seed)
            for seed, name in enumerate(("base", "a", "b"))
        )
        models = "".join(f"  - model: {path}\n" for path in tuned)
        (root / "stf.yml").write_text(
            f"merge_method: stf\nbase_model: {base}\nmodels:\n{models}parameters: {{rule: sum}}\n"
        )
        digests = set()
        for way in WAYS:
            seconds, peak = peak_of([*command(root, way), "--out-shard-size", "1B"])
            out = root / way.replace(" ", "-")
            digests.add(digest(out))
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            shutil.rmtree(out)
            figures[way] = {"seconds": seconds, "peak GB": peak / 1e9, "output GB": size / 1e9}
            print(f"{way}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, output {size / 1e9:.2f} GB")
    assert len(digests) == 1, "sums do not depend on threads"
    peaks = [figures[way]["peak GB"] for way in WAYS]
    judge(figures, "more GB", peaks[1] - peaks[0], "at most", MORE)
    finish(given, figures)


if __name__ == "__main__":
    main()
