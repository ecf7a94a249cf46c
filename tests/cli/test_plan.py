from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_stf.cli.plan import duration
from mergekit_stf.host.calibrate import EXPONENT, Kind, _rank, kind_of, measure_kinds
from mergekit_stf.host.options import MergeOptions
from mergekit_stf.host.planned import plan_weights
from mergekit_stf.host.probe import probe
from mergekit_stf.host.recipe import load_recipe
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.models import Checkpoints, llama, perturb, save_model, tensors_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return tiny_models(tmp_path_factory.mktemp("models"), layout=layout)


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", models)


def kind(rule: str = "superpose", sides: tuple[int, int] = (96, 64)) -> Kind:
    return Kind(rule, 1, sides, torch.float32, (1.0, 1.0), (1.0, 1.0), 1.0, "auto")


def test_the_table_counts_every_weight_by_rule(recipe: Path, models: Checkpoints) -> None:
    done = run("plan", recipe, "--json", "--out", recipe.parent / "out")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    tensors = tensors_of(models.base)
    rules = {row["rule"]: row for row in plan["rules"]}
    assert sum(row["weights"] for row in rules.values()) == len(tensors)
    assert sum(row["parameters"] for row in rules.values()) == sum(
        tensor.numel() for tensor in tensors.values()
    )
    linear = [n for n in tensors if "proj" in n]
    assert rules["superpose"]["weights"] == len(linear)
    assert rules["superpose"]["parameters"] == sum(tensors[n].numel() for n in linear)
    assert rules["mean"]["weights"] == sum("norm" in n for n in tensors)
    assert plan["estimate"]["output"] == sum(t.nbytes for t in tensors.values())
    assert plan["estimate"]["mapped"] == 4 * plan["estimate"]["output"]
    assert plan["probe"] is None
    assert plan["warnings"] == []
    assert not (recipe.parent / "out").exists()
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["recipe.yml"]


def test_no_weight_is_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("mergekit.io.lazy_tensor_loader.LazyTensorLoader.get_tensor", refuse)
    assert run("plan", recipe).exit_code == 0


def test_the_page_names_time_memory_and_the_costliest_weights(recipe: Path) -> None:
    done = run("plan", recipe)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert {"rule", "superpose", "sum", "mean", "time", "memory", "disk"} <= set(lines)
    assert "of mapped inputs" in lines["memory"]
    costliest = done.stdout.partition("costliest weights\n")[2].splitlines()[0]
    assert "_proj.weight" in costliest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"lamda": 0.5}}, "did you mean 'lambda'"),
        ({"base_model": "/nowhere"}, "/nowhere"),
        ({"merge_method": "ties"}, "not 'stf'"),
    ],
)
def test_a_recipe_that_cannot_be_merged_ends_with_1(
    recipe: Path, change: dict[str, object], message: str
) -> None:
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data.update(change)
    if data["merge_method"] == "ties":
        data["parameters"] = {"weight": 1.0}
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    failed = run("plan", recipe)
    assert failed.exit_code == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr


def test_other_shapes_are_found_before_the_merge(models: Checkpoints, tmp_path: Path) -> None:
    other = save_model(llama(intermediate_size=32), tmp_path / "other", tasks=1)
    mixed = Checkpoints(models.base, (models.tuned[0], other.tuned[0]))
    failed = run("plan", write_recipe(tmp_path / "recipe.yml", mixed))
    assert failed.exit_code == 1
    assert "mlp" in failed.stderr


def test_strict_makes_a_warning_an_error(recipe: Path, models: Checkpoints) -> None:
    write_recipe(recipe, models, normalize=True)
    plan = run("plan", recipe, "--strict", "--json")
    assert plan.exit_code == 1
    assert "normalize" in json.loads(plan.stdout)["warnings"][0]
    assert run("plan", recipe).exit_code == 0


def test_a_probe_finds_what_is_wrong_with_the_models(models: Checkpoints, tmp_path: Path) -> None:
    base, first = (tensors_of(m) for m in (models.base, models.tuned[0]))
    changes = {
        "twin": {n: base[n] + 1.05 * (first[n] - base[n]) for n in base},
        "loud": {n: base[n] + 9 * (first[n].flip(0) - base[n].flip(0)) for n in base},
        "same": base,
        "sparse": {n: torch.where(torch.arange(t[0].numel()) == 0, t + 1, t) if t.ndim == 2 else t
                   for n, t in base.items()},
    }  # fmt: skip
    for name, tensors in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        (folder / "config.json").write_bytes((models.base / "config.json").read_bytes())
    mixed = Checkpoints(models.base, (models.tuned[0], *(tmp_path / name for name in changes)))
    done = run("plan", write_recipe(tmp_path / "recipe.yml", mixed), "--probe", "100", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    found = "\n".join(plan["warnings"])
    assert f"{models.tuned[0]} and {tmp_path / 'twin'} are near-duplicates (cosine 1.000)" in found
    assert "same does not differ from the base" in found
    assert "sparse: 9" in found
    assert "loud changed the base" in found or "sparse changed the base" in found
    assert plan["probe"]["sampled"] == 14


def test_a_probe_says_what_dtype_rounds_off(models: Checkpoints, tmp_path: Path) -> None:
    small = save_model(llama(), tmp_path / "fine", tasks=0)
    tuned = perturb(llama(), 1, scale=1e-4)
    tuned.save_pretrained(tmp_path / "fine" / "tuned1")
    recipe = write_recipe(
        tmp_path / "recipe.yml", Checkpoints(small.base, (tmp_path / "fine" / "tuned1",))
    )
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    (exact,) = probe(plan_weights(load_recipe(recipe).config, MergeOptions())).models
    assert exact.lost == 0
    recipe.write_text(yaml.safe_dump({**data, "dtype": "bfloat16"}), encoding="utf-8")
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    found = probe(weights)
    assert "rounds off" in found.warnings[0]
    flat = {
        name: torch.cat(
            [load_file(folder / "model.safetensors")[weight.name].flatten() for weight in weights]
        )
        for name, folder in (("base", small.base), ("tuned", tmp_path / "fine" / "tuned1"))
    }
    exact_delta = flat["tuned"].double() - flat["base"].double()
    rounded = flat["tuned"].bfloat16().double() - flat["base"].bfloat16().double()
    expected = float((rounded - exact_delta).norm() / exact_delta.norm())
    assert found.models[0].lost == pytest.approx(expected, rel=1e-6)
    assert found.models[0].norm == pytest.approx(float(rounded.norm()), rel=1e-6)


def test_a_kind_is_measured_at_its_own_size_when_there_is_time() -> None:
    (seconds,) = measure_kinds([kind()], CPU).values()
    assert 0 < seconds < 1


def test_a_large_kind_is_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def cubic(kind: Kind, side: int, device: torch.device) -> float:
        sides.append(side)
        return 1e-3 * (side / 64) ** EXPONENT

    monkeypatch.setattr("mergekit_stf.host.calibrate._run", cubic)
    large = kind(sides=(4096, 4096))
    assert measure_kinds([large], CPU)[large] == pytest.approx(1e-3 * 64**3)
    assert max(sides) < 1024


def test_kinds_join_what_costs_the_same(recipe: Path) -> None:
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    kinds = {weight.name: kind_of(weight) for weight in weights}
    up, down = (kinds[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert up == down
    assert len(set(kinds.values())) == 4


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.254, "0.25 s"), (42.4, "42 s"), (150, "2 min"), (9000, "2.5 h")]
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_pause_of_the_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([1.0, 0.001, 5.0])

    def paused(kind: Kind, side: int, device: torch.device) -> float:
        return next(runs, 0.008)

    monkeypatch.setattr("mergekit_stf.host.calibrate._run", paused)
    large = kind(sides=(512, 512))
    assert measure_kinds([large], CPU)[large] == pytest.approx(0.008)


def test_a_number_of_features_shrinks_with_the_side() -> None:
    kinds = {rank: replace(kind(sides=(1024, 512)), rank=rank) for rank in (0.5, 1.0, 64.0)}
    ranks = [[_rank(kinds[rank], side) for side in (1024, 256)] for rank in kinds]
    assert ranks == [[0.5, 0.5], [1, 1], [64, 16]]


def test_the_memory_of_a_parent_does_not_count() -> None:
    code = "from mergekit_stf.host.record_numbers import peak_rss; print(peak_rss())"
    filler = torch.ones(2**28)
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 10**7 < peak < filler.nbytes


@pytest.mark.slow
def test_the_estimate_is_near_what_the_merge_takes(tmp_path: Path) -> None:
    """Repeated, as other work on the machine can slow one of the two and not the other."""
    size = {"hidden_size": 384, "intermediate_size": 1024, "vocab_size": 2000}
    recipe = write_recipe(tmp_path / "recipe.yml", save_model(llama(**size), tmp_path / "models"))
    ratios = [_over_actual(recipe, tmp_path / "0")]
    while not 1 / 1.5 < ratios[-1] < 1.5 and len(ratios) < 3:
        ratios.append(_over_actual(recipe, tmp_path / str(len(ratios))))
    assert 1 / 1.5 < ratios[-1] < 1.5, ratios


def _over_actual(recipe: Path, out: Path) -> float:
    """Return the estimated time of merging over what it then takes; check the memory."""
    plan = json.loads(_process("plan", recipe, "--json"))["estimate"]
    _process("merge", recipe, out, "--quiet")
    lines = (out / "stf-diagnostics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    memory = max(record["peak_rss"] for record in records)
    assert 1 / 1.5 < plan["memory"] / memory < 1.5
    return float(plan["merging"]) / sum(record["seconds"] for record in records)


def _process(*arguments: object) -> str:
    start = "from mergekit_stf.cli.main import main; main()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
