"""Shapes, splits, stacks and adapters, by methods that treat each entry by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mergekit_stf.cli.main import main
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.merging.job import Task, WeightJob, merge_weight
from mergekit_stf.host.merging.split import parse_split
from mergekit_stf.report.facts import linear_maps
from tests import oracle
from tests.elementwise_oracles import consensus_ta, localize_stitch, pcb
from tests.host import peft_adapters as made
from tests.host.merging import merge, parameters, recipe, relative_error
from tests.host.models import llama, save_family, save_model

OPTIONS: dict[str, dict[str, Any]] = {
    "pcb": {"ratio": 0.1},
    "consensus_ta": {"mask": 0.4, "agreeing": 2},
    "localize_stitch": {},
}
ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "pcb": pcb,
    "consensus_ta": consensus_ta,
    "localize_stitch": localize_stitch,
}
LAMBDAS = {"consensus_ta": 0.4}
METHODS = pytest.mark.parametrize("method", ORACLES)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def job_of(method: str, kind: Kind, tuned: list[torch.Tensor | None], **more: Any) -> WeightJob:
    like = next(P for P in tuned if P is not None)
    tasks = tuple(Task(str(number), tuned=P) for number, P in enumerate(tuned))
    given = {"base": torch.zeros_like(like), "tasks": tasks, "options": OPTIONS[method]}
    return WeightJob(name="weight", kind=kind, method=method, **(given | more))


def wanted(method: str, *parts: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ORACLES[method]([P.double().numpy() for P in parts])))


@METHODS
@pytest.mark.parametrize("shape", [(), (1,), (50,), (30, 20), (8, 3, 4), (6, 3, 2, 2)])
def test_what_is_no_linear_map_is_merged_whole(method: str, shape: tuple[int, ...]) -> None:
    tuned = [draw(seed, *shape) for seed in range(3)]
    result = merge_weight(job_of(method, Kind.VECTOR, [*tuned], split=parse_split("rows 2")))
    torch.testing.assert_close(result.tensor.double(), wanted(method, *tuned), atol=1e-8, rtol=1e-5)
    assert result.record is not None
    assert result.record.rule == "merge"


@METHODS
def test_reports_compare_models_by_their_matrices(method: str) -> None:
    shapes = {Kind.LINEAR: (30, 20), Kind.NORMALISATION: (50,)}
    results = [
        merge_weight(job_of(method, kind, [draw(1, *shape), draw(2, *shape)]))
        for kind, shape in shapes.items()
    ]
    records = [result.record for result in results if result.record is not None]
    assert [len(record.norms) for record in records] == [2, 2]
    assert linear_maps(records) == records[:1]


@METHODS
def test_experts_are_merged_one_by_one(method: str) -> None:
    tuned = [draw(seed, 4, 30, 20) for seed in range(3)]
    found = merge_weight(job_of(method, Kind.LINEAR, [*tuned])).tensor
    for expert in range(4):
        alone = merge_weight(job_of(method, Kind.LINEAR, [P[expert] for P in tuned])).tensor
        assert torch.equal(found[expert], alone)


@METHODS
def test_the_maps_of_a_split_are_merged_one_by_one(method: str) -> None:
    tuned = [draw(seed, 30, 60) for seed in range(3)]
    job = job_of(method, Kind.LINEAR, [*tuned], split=parse_split("columns 3"))
    found = merge_weight(job).tensor
    parts = [P.split(20, dim=1) for P in tuned]
    for number, own in enumerate(zip(*parts, strict=True)):
        alone = merge_weight(job_of(method, Kind.LINEAR, [P.contiguous() for P in own])).tensor
        assert torch.equal(found[:, 20 * number : 20 * (number + 1)], alone)


@METHODS
@pytest.mark.parametrize("shape", [(50,), (30, 20)])
def test_a_model_that_leaves_a_weight_alone_is_a_task_of_zeros(
    method: str, shape: tuple[int, ...]
) -> None:
    """As adapters do that bring biases or normalisations which others have not."""
    tuned = [draw(1, *shape), None, draw(2, *shape)]
    result = merge_weight(job_of(method, Kind.NORMALISATION, tuned))
    expected = wanted(method, draw(1, *shape), torch.zeros(shape), draw(2, *shape))
    torch.testing.assert_close(result.tensor.double(), expected, atol=1e-8, rtol=1e-5)
    assert result.record is not None
    assert len(result.record.norms) == 3


@METHODS
def test_weights_densities_and_rules(method: str, tmp_path: Path) -> None:
    models = save_family("llama", tmp_path, tasks=2)
    config = recipe(models, merge_method=method)
    weights, densities = (0.5, 1.5), (0.3, 1.0)
    for entry, weight, density in zip(config["models"], weights, densities, strict=True):
        entry["parameters"] = {"weight": weight, "density": density}
    rules = [{"filter": "norm", "value": "sum"}, {"filter": "embed", "value": "base"}]
    config["parameters"] = {"lambda": 0.7, "rule": [*rules, {"value": "auto"}]}
    merge(config, tmp_path / "out")
    kind = type(llama())
    base, *tuned = (parameters(folder, kind) for folder in (models.base, *models.tuned))
    for name, found in parameters(tmp_path / "out", kind).items():
        P0, *others = (one[name].double().numpy() for one in (base, *tuned))
        deltas = [
            oracle.trim(weight * (P - P0), density)
            for P, weight, density in zip(others, weights, densities, strict=True)
        ]
        M = sum(deltas) if "norm" in name else ORACLES[method](deltas)
        expected = torch.from_numpy(P0 + 0.7 * M * ("embed" not in name))
        assert relative_error(found, expected, base[name]) <= 1e-4, name


def test_stitching_keeps_a_twentieth_where_the_recipe_says_nothing(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path, tasks=2)
    config = recipe(models, merge_method="localize_stitch")
    del config["parameters"]
    config["models"] = [{"model": str(folder)} for folder in models.tuned]
    merge(config, tmp_path / "out")
    kind = type(llama())
    base, *tuned = (parameters(folder, kind) for folder in (models.base, *models.tuned))
    for name, found in parameters(tmp_path / "out", kind).items():
        P0, *others = (one[name].double().numpy() for one in (base, *tuned))
        M = localize_stitch([oracle.trim(P - P0, 0.05) for P in others])
        assert relative_error(found, torch.from_numpy(P0 + M), base[name]) <= 1e-4, name


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three adapters, the first of which brings a whole normalisation besides."""
    root = tmp_path_factory.mktemp("adapters")
    base = save_model(llama(), root, tasks=0).base
    more = [{"modules_to_save": ["input_layernorm"]}, {}, {}]
    targets = made.LLAMA_LINEAR
    return base, [
        made.save_adapter(base, root / f"adapter{seed}", seed, target_modules=targets, **extra)
        for seed, extra in enumerate(more, start=1)
    ]


def lora(method: str, adapters: tuple[Path, list[Path]], folder: Path, *options: str) -> Any:
    base, paths = adapters
    content = made.recipe(base, made.on_base(base, paths), merge_method=method, parameters={})
    path = made.write(content, folder / "recipe.yml")
    return CliRunner().invoke(main, ["lora", str(path), str(folder / "out"), *options])


@METHODS
def test_adapters_give_a_model(
    method: str, adapters: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (*paths, _) = adapters
    result = lora(method, (base, paths), tmp_path)
    assert result.exit_code == 0, result.output
    kind = type(llama())
    full = [made.save_full(base, path, tmp_path / path.name) for path in paths]
    start, *tuned = (parameters(folder, kind) for folder in (base, *full))
    for name, found in parameters(tmp_path / "out", kind).items():
        P0, *others = (one[name].double().numpy() for one in (start, *tuned))
        density = 0.05 if method == "localize_stitch" else 1.0
        M = ORACLES[method]([oracle.trim(P - P0, density) for P in others])
        expected = torch.from_numpy(P0 + LAMBDAS.get(method, 1.0) * M)
        assert relative_error(found, expected, start[name]) <= 1e-4, name


@METHODS
def test_one_adapter_needs_a_rank(
    method: str, adapters: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (_, *paths) = adapters
    result = lora(method, (base, paths), tmp_path, "--adapter")
    assert result.exit_code == 1
    assert f"its update by {method} has rank" in result.output
    assert lora(method, (base, paths), tmp_path, "--adapter", "--max-rank", "4").exit_code == 0
