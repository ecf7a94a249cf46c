from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.methods.method import MERGE
from mergekit_stf.core.pool import workspace
from mergekit_stf.core.solve.gram import blocks_size
from mergekit_stf.host.merging.job import WeightJob
from mergekit_stf.host.planning import calibrate, estimate
from mergekit_stf.host.planning.calibrate import EXPONENT, Workload, time_workloads, workload_of
from mergekit_stf.host.planning.file_speed import SAMPLE, FileSpeed, measure_file_speed
from mergekit_stf.host.planning.plan import format_duration
from mergekit_stf.host.planning.planned import plan_weights
from mergekit_stf.host.planning.probe import probe_models
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.recipe.recipe import load_recipe
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.classes import configuration
from tests.host.models import Checkpoints, build, llama, perturb, save_model, tensors_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return tiny_models(tmp_path_factory.mktemp("models"), layout=layout)


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", models)


def workload(rule: str = MERGE, sides: tuple[int, int] = (96, 64), rank: float = 1.0) -> Workload:
    options = (("rank", rank), ("ridge", "auto"))
    return Workload(rule, "stf", options, 1, sides, torch.float32, (1.0, 1.0), (1.0, 1.0))


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
        ({"merge_method": "ties"}, "plan knows stf"),
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


@pytest.mark.parametrize(
    ("label", "table"),
    [
        ("GPT2LMHeadModel", "transformer.wte.weight"),
        ("LlamaForCausalLM", "model.embed_tokens.weight"),
        ("T5ForConditionalGeneration", "shared.weight"),
    ],
)
def test_vocabularies_of_other_sizes_name_the_way_out(
    label: str, table: str, tmp_path: Path
) -> None:
    folders = []
    for size in (40, 44):
        config = configuration(label)
        config.vocab_size = size
        folders.append(save_model(build(label, config), tmp_path / str(size), tasks=1))
    mixed = Checkpoints(folders[0].base, (folders[0].tuned[0], folders[1].tuned[0]))
    failed = run("plan", write_recipe(tmp_path / "recipe.yml", mixed))
    assert failed.exit_code == 1
    assert f"{table}: {mixed.tuned[1]} has a vocabulary of 44 tokens, the base one of 40; add " in (
        failed.stderr
    )
    assert "«tokenizer: {source: union}»" in failed.stderr
    assert "«tokenizer: {source: base}»" in failed.stderr


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
    (exact,) = probe_models(plan_weights(load_recipe(recipe).config, MergeOptions())).models
    assert exact.lost == 0
    recipe.write_text(yaml.safe_dump({**data, "dtype": "bfloat16"}), encoding="utf-8")
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    found = probe_models(weights)
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


class Clock:
    """A device on which work takes the time of a law, and a clock that only work moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unit: float, power: float) -> None:
        self.now, self.unit, self.power = 0.0, unit, power
        self.sides: list[int] = []
        monkeypatch.setattr(calibrate, "merge_weight", self.run)
        monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def run(self, job: WeightJob) -> None:
        side = job.base.shape[0]
        self.now += self.law(side)
        self.sides.append(side)

    def law(self, side: int) -> float:
        return self.unit * side**self.power


def test_a_workload_is_measured_at_its_own_size_when_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, 1e-9, 2.5)
    whole = workload(sides=(512, 512))
    assert time_workloads([whole], CPU)[whole] == pytest.approx(clock.law(512))
    assert clock.sides[-1] == 512


def test_a_large_workload_is_scaled_up_by_the_cube(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e-8, EXPONENT)
    large = workload(sides=(4096, 4096))
    assert time_workloads([large], CPU)[large] == pytest.approx(clock.law(4096))
    assert 256 <= max(clock.sides) < 1024


def test_a_vector_is_scaled_up_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e-4, 1.0)
    long = workload("sum", sides=(10**6, 1))
    assert time_workloads([long], CPU)[long] == pytest.approx(clock.law(10**6))
    assert max(clock.sides) < 10**5


@pytest.mark.parametrize("unit", [1e-10, 1e-9, 1e-8, 1e-7])
def test_calibration_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch, unit: float) -> None:
    clock = Clock(monkeypatch, unit, EXPONENT)
    loads = [workload(sides=(side, side)) for side in (4096, 2048, 1024)]
    found = time_workloads(loads, CPU, budget=4.0)
    assert found == pytest.approx({one: clock.law(one.sides[0]) for one in loads})
    least = 7 * clock.law(256)
    assert clock.now < 4.0 + least


def test_a_stack_costs_as_often_as_it_has_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e-9, EXPONENT)
    stack = replace(workload(sides=(256, 256)), stack=8)
    assert time_workloads([stack], CPU)[stack] == pytest.approx(8 * clock.law(256))


def test_an_estimate_adds_up_its_parts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of every weight, of every byte hashed and written, and of the start."""
    costs = {MERGE: 3.0, "sum": 0.5, "mean": 0.25}
    monkeypatch.setattr(
        estimate, "time_workloads", lambda found, device: {one: costs[one.rule] for one in found}
    )
    monkeypatch.setattr(estimate, "process_age", lambda: 7.0)
    monkeypatch.setattr(estimate, "peak_rss", lambda: 10**9)
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    found = estimate.estimate_merge(weights, MergeOptions(), FileSpeed(1.0, 100.0))
    assert found.by_weight == {weight.name: costs[weight.resolved_rule] for weight in weights}
    assert found.merging == sum(costs[weight.resolved_rule] for weight in weights)
    assert found.files == found.mapped + 100 * (found.store + found.output)
    assert found.seconds == found.merging + found.files + 7
    numel = {weight.name: weight.numel for weight in weights}
    assert found.output == 4 * sum(numel.values())
    assert found.mapped == 4 * found.output
    assert found.store == 4 * sum(numel[w.name] for w in weights if w.rule == "superpose")
    work = found.memory - 10**9 - found.mapped - found.output
    assert work == max(estimate.working_bytes(weight, CPU) for weight in weights)


def test_a_superposed_weight_needs_its_tasks_features_beside_it(recipe: Path) -> None:
    """Base and result, a task matrix in three copies, and U and V of each task."""
    weights = {w.name: w for w in plan_weights(load_recipe(recipe).config, MergeOptions())}
    up, table = weights["model.layers.0.mlp.up_proj.weight"], weights["model.embed_tokens.weight"]
    assert up.header.shape == (24, 16)
    whole, features = 4 * 24 * 16, 4 * (16 * 16 + 24 * 16)
    most = max(workspace(16, 3, CPU), blocks_size(24, 16, 3))
    assert estimate.working_bytes(up, CPU) == 5 * whole + 3 * features + most
    assert estimate.working_bytes(table, CPU) == 4 * 4 * 40 * 16


def test_the_speed_of_files_is_measured_on_the_disk_of_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    found = measure_file_speed(tmp_path, iter([0.0, 0.5, 2.5]).__next__)
    assert (found.hashing * SAMPLE, found.writing * SAMPLE) == (0.5 / 4, 2.0)
    assert 0 < measure_file_speed(tmp_path).writing < 1e-3
    with pytest.raises(STFError, match="nowhere: cannot be written: No such file"):
        measure_file_speed(tmp_path / "nowhere")


def test_workloads_join_what_costs_the_same(recipe: Path) -> None:
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    loads = {weight.name: workload_of(weight) for weight in weights}
    up, down = (loads[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "down"))
    assert up == down
    assert len(set(loads.values())) == 4


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.254, "0.25 s"), (42.4, "42 s"), (150, "2 min"), (9000, "2.5 h")]
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_a_pause_of_the_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1e-9, EXPONENT)
    runs = iter([1.0, clock.law(256), 5.0])

    def paused(job: WeightJob) -> None:
        clock.now += next(runs, clock.law(job.base.shape[0]))

    monkeypatch.setattr(calibrate, "merge_weight", paused)
    large = workload(sides=(512, 512))
    assert time_workloads([large], CPU)[large] == pytest.approx(clock.law(512))


@pytest.mark.parametrize(("rank", "small"), [(0.5, 0.5), (1.0, 1.0), (64.0, 16.0)])
def test_a_number_of_features_shrinks_with_the_side(
    rank: float, small: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[WeightJob] = []
    monkeypatch.setattr(calibrate, "merge_weight", jobs.append)
    time_workloads([workload(sides=(1024, 512), rank=rank)], CPU, budget=0.0)
    assert {(job.base.shape, job.options["rank"]) for job in jobs} == {((256, 128), small)}


@pytest.mark.slow
def test_the_memory_of_a_parent_does_not_count() -> None:
    code = "from mergekit_stf.host.diagnostics.memory import peak_rss; print(peak_rss())"
    filler = torch.ones(2**28)
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 10**7 < peak < filler.nbytes
