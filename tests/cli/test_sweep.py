from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_stf.core import Merged, STFError, TaskMatrices
from mergekit_stf.core.methods.stf import SuperposeFeatures
from mergekit_stf.host.provenance import digests as digests_module
from mergekit_stf.host.provenance.lock import read_lock
from mergekit_stf.host.recipe.grid import find_overrides, grid_points, parse_values
from mergekit_stf.host.recipe.recipe import load_recipe
from tests.cli.merges import run, tiny_models, write_recipe
from tests.host.models import Checkpoints

SIZE = f"{sys.executable} -c 'import sys; print(\"points\", len(sys.argv[1]))' {{out}}"


@pytest.fixture(scope="module")
def models(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return tiny_models(tmp_path_factory.mktemp("models"), layout=layout)


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yml", models, density=0.5)


def digests(folder: Path) -> dict[str, str]:
    return {record.name: record.sha256 for record in read_lock(folder).outputs}


def test_each_point_is_a_single_merge_byte_for_byte(
    recipe: Path, models: Checkpoints, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    done = run("sweep", recipe, out, "--lambda", "0.4,1", "--density", "0.2,1", "--quiet")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert names == [f"density-{d}_lambda-{x}" for d in ("0.2", "1") for x in ("0.4", "1")]
    for name in names:
        density, scale = (float(part.split("-")[1]) for part in name.split("_"))
        single = write_recipe(tmp_path / "one.yml", models, density=density, **{"lambda": scale})
        assert run("merge", single, tmp_path / "single" / name, "--quiet").exit_code == 0
        found, expected = digests(out / name), digests(tmp_path / "single" / name)
        different = {file for file in expected if found[file] != expected[file]}
        assert different <= {"README.md", "mergekit_config.yml"}
        written = yaml.safe_load((out / name / "mergekit_config.yml").read_text(encoding="utf-8"))
        assert written == yaml.safe_load(single.read_text(encoding="utf-8"))
        assert run("verify", out / name).exit_code == 0


def test_a_decomposition_is_done_once_for_each_density(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[str] = []
    merge = SuperposeFeatures.merge

    def counted(self: SuperposeFeatures, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        solved.append(tasks.name)
        return merge(self, tasks, options)

    monkeypatch.setattr(SuperposeFeatures, "merge", counted)
    grid = ("--lambda", "0.4:1.2:0.2", "--density", "0.2,1")
    assert run("sweep", recipe, tmp_path / "out", *grid, "--quiet").exit_code == 0
    assert len(set(solved)) == 14
    assert len(solved) == 2 * 14
    assert not (tmp_path / "out" / ".store").exists()


def test_an_input_is_hashed_once(
    recipe: Path, models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    pieces = digests_module.read_chunks

    def counted(path: Path) -> Iterator[memoryview]:
        hashed.append(path)
        return pieces(path)

    monkeypatch.setattr(digests_module, "read_chunks", counted)
    out = tmp_path / "out"
    assert run("sweep", recipe, out, "--lambda", "0.4,0.6,0.8", "--quiet").exit_code == 0
    assert len(hashed) == len(set(hashed)) > 4
    assert {*models.base.glob("*.safetensors*")} <= set(hashed)
    locks = [read_lock(out / f"lambda-{value}").models for value in ("0.4", "0.6", "0.8")]
    assert locks[0] == locks[1] == locks[2]


def test_a_file_is_hashed_again_once_it_has_changed(tmp_path: Path) -> None:
    path, known = tmp_path / "file", {}
    path.write_text("before")
    before = digests_module.digest_of(path, known)
    path.write_text("afterwards")
    after = digests_module.digest_of(path, known)
    assert [before, after] == [hashlib.sha256(x).hexdigest() for x in (b"before", b"afterwards")]


def test_a_point_that_is_there_is_not_merged_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("sweep", recipe, out, "--lambda", "0.5", "--quiet").exit_code == 0
    before = (out / "lambda-0.5" / "model.safetensors").stat().st_mtime_ns
    again = run("sweep", recipe, out, "--lambda", "0.5,0.6")
    assert again.exit_code == 0
    assert "lambda-0.5 is there already" in again.output
    assert (out / "lambda-0.5" / "model.safetensors").stat().st_mtime_ns == before
    assert (out / "lambda-0.6" / "stf.lock.json").exists()
    changed = write_recipe(tmp_path / "other.yml", tiny_models(tmp_path / "more"))
    failed = run("sweep", changed, out, "--lambda", "0.5")
    assert failed.exit_code == 1
    assert "holds a merge of another recipe" in failed.stderr


def test_a_finished_point_that_changed_is_noticed(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models")
    recipe, out = write_recipe(tmp_path / "recipe.yml", models), tmp_path / "out"
    sweep = ("sweep", recipe, out, "--lambda", "0.5,0.6")
    assert run(*sweep, "--quiet").exit_code == 0
    for path, what in (
        (out / "lambda-0.6" / "model.safetensors", "output model.safetensors: other bytes"),
        (models.tuned[1] / "model.safetensors", "model.safetensors: other bytes"),
        (out / "lambda-0.5" / "config.json", "output config.json: other bytes"),
    ):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        failed = run(*sweep)
        assert failed.exit_code == 1, failed.output
        assert what in failed.stderr
        assert "remove it to merge it again" in failed.stderr
        path.write_bytes(before)
        assert run(*sweep).exit_code == 0
    (out / "lambda-0.5" / "config.json").unlink()
    assert "output config.json: missing" in run(*sweep).stderr


def test_a_point_of_other_options_is_noticed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("sweep", recipe, out, "--lambda", "0.5", "--quiet").exit_code == 0
    failed = run("sweep", recipe, out, "--lambda", "0.5", "--out-shard-size", "1M")
    assert failed.exit_code == 1
    assert "was merged with other options; remove it" in failed.stderr


@pytest.mark.parametrize("broken", ["nothing", "no lock"])
def test_a_folder_in_the_way_proposes_no_option_that_sweep_lacks(
    recipe: Path, tmp_path: Path, broken: str
) -> None:
    point = tmp_path / "out" / "lambda-0.5"
    point.mkdir(parents=True)
    if broken == "no lock":
        (point / "thesis").touch()
    done = run("sweep", recipe, tmp_path / "out", "--lambda", "0.5", "--quiet")
    assert done.exit_code == (broken == "no lock"), done.output
    assert "--force" not in done.output
    if broken == "no lock":
        assert "lambda-0.5 holds no finished point; remove it, or name another OUT" in done.stderr
        assert (point / "thesis").exists()


def test_a_folder_of_the_users_by_the_stores_name_stays(recipe: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "out" / ".store" / "thesis"
    thesis.parent.mkdir(parents=True)
    thesis.touch()
    assert run("sweep", recipe, tmp_path / "out", "--lambda", "0.5", "--quiet").exit_code == 0
    assert list(thesis.parent.iterdir()) == [thesis]


@pytest.mark.parametrize("name", ["dangling", "~/out"])
def test_a_sweep_cannot_go_anywhere(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    failed = run("sweep", recipe, name, "--lambda", "0.5")
    assert failed.exit_code == 1
    assert name in failed.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_an_evaluation_finds_the_best_point(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("sweep", recipe, out, "--lambda", "0.5,0.75", "--eval", SIZE, "--quiet")
    assert done.exit_code == 0, done.output
    rows = list(csv.reader((out / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    scores = [float(len(str(out / f"lambda-{value}"))) for value in ("0.5", "0.75")]
    assert rows[0] == ["lambda", "score", "folder"]
    assert [float(row[1]) for row in rows[1:]] == scores
    assert yaml.safe_load((out / "best.yml").read_text("utf-8"))["parameters"]["lambda"] == 0.75
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    run("sweep", recipe, out, "--lambda", "0.5,0.75", "--eval", SIZE, "--lower-is-better")
    assert yaml.safe_load((out / "best.yml").read_text("utf-8"))["parameters"]["lambda"] == 0.5


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("true", "does not say {out}"),
        ("'{out}", "cannot be split"),
        ("false {out}", "ended with exit code 1"),
        ("no-such-program {out}", "cannot run no-such-program"),
        ("echo {out} fine", "ends with no number"),
        ("echo {out} nan", "ends with no number"),
        ("true {out}", "ends with no number: ''"),
    ],
)
def test_an_evaluation_that_cannot_be_used_is_one_line(
    recipe: Path, tmp_path: Path, command: str, message: str
) -> None:
    failed = run("sweep", recipe, tmp_path / "out", "--lambda", "0.5", "--eval", command)
    assert failed.exit_code == 1
    assert message in failed.stderr.splitlines()[-1]


def test_a_sweep_needs_something_to_sweep(recipe: Path, tmp_path: Path) -> None:
    failed = run("sweep", recipe, tmp_path / "out")
    assert failed.exit_code == 2
    assert "--lambda, --density, --rank and --vary" in failed.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.4:0.8:0.2", (0.4, 0.6, 0.8)),
        ("0.4:1.2:0.1", (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)),
        ("0.1,0.2,0.1", (0.1, 0.2)),
        ("1,0.2:0.3:0.05", (1.0, 0.2, 0.25, 0.3)),
        ("0.5:0.9:0.3", (0.5, 0.8)),
    ],
)
def test_values_are_read(text: str, expected: tuple[float, ...]) -> None:
    assert parse_values(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1:2", "2:1:0.1", "1:2:0", "1:2:3:4", "nan", "0:inf:1"])
def test_values_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(STFError, match="neither a list"):
        parse_values(text)


def test_too_many_values_are_refused() -> None:
    with pytest.raises(STFError, match="more than 1000"):
        parse_values("0:1:0.000000000001")


def test_a_value_out_of_range_names_the_point(recipe: Path) -> None:
    with pytest.raises(STFError, match=r"with density 1.5: .*at most 1"):
        grid_points(load_recipe(recipe), {"density": (0.5, 1.5)})


def test_lambda_varies_fastest(recipe: Path) -> None:
    grid = grid_points(load_recipe(recipe), {"lambda": (1.0, 2.0), "rank": (0.5, 1.0)})
    names = [point.name for point in grid]
    assert names == [f"rank-{r}_lambda-{x}" for r in ("0.5", "1") for x in ("1", "2")]


def test_settings_of_single_models_are_replaced_aloud(recipe: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data["models"][0]["parameters"] = {"density": 0.1, "weight": 0.3}
    data["parameters"]["lambda"] = [0.2, 1.0]
    recipe.write_text(yaml.safe_dump(data), encoding="utf-8")
    loaded = load_recipe(recipe)
    assert find_overrides(loaded, ["density", "lambda", "rank"]) == ["density", "lambda"]
    (point,) = grid_points(loaded, {"density": (0.7,)})
    config = point.recipe.config
    assert config.models[0].parameters == {"weight": 0.3}
    assert config.parameters["density"] == 0.7
