"""Print the Markdown tables of ``docs/paper.md`` from ``benchmarks/results/paper-*.json``."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paper.common import read, spread

METHODS = ("linear", "task_arithmetic", "trimmed_sum", "ties", "stf")


def pair(values: list[float], digits: int = 3) -> str:
    mean, deviation = spread(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def quality(variant: str = "") -> Iterator[str]:
    seeds = list(read(f"quality{variant}").values())
    kinds = list(seeds[0]["base"]["losses"])
    yield row("model", "λ", "density", *kinds, "mean", "gain kept, %")
    yield row(*["---"] * (len(kinds) + 5))
    for name in ("base", *METHODS):
        settings = [
            ", ".join(str(seed[name].get(key, "")) for seed in seeds) if name in METHODS else ""
            for key in ("lambda", "density")
        ]
        losses = [pair([seed[name]["losses"][kind] for seed in seeds]) for kind in kinds]
        mean = pair([seed[name]["mean"] for seed in seeds])
        kept = pair([100 * seed[name]["kept"] for seed in seeds], 1)
        yield row(name, *settings, *losses, mean, kept)
    own = [[seed[f"{kind} specialist"]["losses"][kind] for seed in seeds] for kind in kinds]
    means = [sum(losses) / len(kinds) for losses in zip(*own, strict=True)]
    yield row("each specialist on its own", "", "", *map(pair, own), pair(means), "100")


def differences(variant: str = "") -> Iterator[str]:
    seeds = list(read(f"quality{variant}").values())
    yield row("stf minus", "mean loss, bits per byte", "gain kept, points")
    yield row("---", "---", "---")
    for rival in METHODS[:-1]:
        losses = [seed["stf"]["mean"] - seed[rival]["mean"] for seed in seeds]
        kept = [100 * (seed["stf"]["kept"] - seed[rival]["kept"]) for seed in seeds]
        yield row(rival, pair(losses, 4), pair(kept, 1))


def preservation(variant: str = "") -> Iterator[str]:
    yield row("method", "density", "FFN inputs", "FFN outputs", "attention")
    yield row(*["---"] * 5)
    for points in zip(*read(f"preservation{variant}").values(), strict=True):
        errors = [
            "{:.2g} ± {:.1g}".format(*spread([point[part] for point in points]))
            for part in ("inputs", "outputs", "attention")
        ]
        yield row(points[0]["method"], str(points[0]["density"]), *errors)


def features() -> Iterator[str]:
    yield row("dropped", "share, %", "gain kept, %", "gain kept at its own best λ, %", "that λ")
    yield row(*["---"] * 5)
    seeds = list(read("features").values())
    for end in ("smallest", "largest"):
        for points in zip(*(seed[end] for seed in seeds), strict=True):
            fixed = pair([100 * p["at fixed lambda"]["kept"] for p in points], 1)
            own = pair([100 * p["at own lambda"]["kept"] for p in points], 1)
            lambdas = ", ".join(str(p["lambda"]) for p in points)
            yield row(end, f"{100 * points[0]['dropped']:.0f}", fixed, own, lambdas)


def timing() -> Iterator[str]:
    methods = ("linear", "task_arithmetic", "ties", "stf")
    yield row("model", "tasks", *(f"{method}, s" for method in methods))
    yield row(*["---"] * 6)
    rows = [line for seed in read("timing").values() for line in seed]
    for model in dict.fromkeys(line["model"] for line in rows):
        same = [line for line in rows if line["model"] == model]
        best = [f"{min(line[method] for line in same):.3f}" for method in methods]
        yield row(model, str(same[0]["tasks"]), *best)


if __name__ == "__main__":
    for variant in ("", "-plain"):
        for table in (quality, differences, preservation):
            print("\n".join(table(variant)), end="\n\n")
    print("\n".join([*features(), "", *timing()]))
