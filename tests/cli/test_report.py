from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_stf.core import superpose
from mergekit_stf.host.diagnostics import finished
from mergekit_stf.host.diagnostics.finished import Finished
from mergekit_stf.host.diagnostics.preservation import RIVALS, Preservation, measure_preservation
from mergekit_stf.host.diagnostics.records import Record
from mergekit_stf.host.diagnostics.sample import layer_and_kind, spread
from mergekit_stf.host.planning.planned import plan_weights
from mergekit_stf.host.plugin.options import MergeOptions
from mergekit_stf.host.recipe.recipe import load_recipe
from mergekit_stf.report.facts import build_report, without_common_start
from mergekit_stf.report.page import render, significant
from mergekit_stf.report.plots import draw_plots
from tests.cli.browser import ask
from tests.cli.merges import run, tiny_models, write_recipe

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of three tiny Llamas, and a report on it."""
    folder = tmp_path_factory.mktemp("merge")
    recipe = write_recipe(folder / "recipe.yml", tiny_models(folder / "models"), **{"lambda": 0.5})
    done = run("merge", recipe, folder / "out", "--quiet")
    assert done.exit_code == 0, done.output
    done = run("report", folder / "out", "--quiet")
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.fixture(scope="module")
def measured(merged: Path) -> Preservation:
    finished = Finished(merged)
    weight = next(w for w in finished.weights() if w.name == WEIGHT)
    return measure_preservation(weight, finished.weight(WEIGHT))


def records(count: int = 6, **changes: object) -> list[Record]:
    """Records of made-up weights, from real solves."""
    torch.manual_seed(0)
    made = []
    for layer in range(count):
        solved = superpose([torch.randn(8, 6) for _ in range(2)]).record
        made.append(
            replace(
                solved,
                name=f"model.layers.{layer}.mlp.up_proj.weight",
                method="stf",
                rule="superpose",
                shape=(8, 6),
                models=("/m/a", "/m/b"),
                seconds=0.1,
                **changes,  # type: ignore[arg-type]
            )
        )
    return made


def independent_error(merged: Path, M: torch.Tensor, weight: str) -> float:
    """The paper's appendix A, written out in float64 from the files."""
    models = merged.parent / "models"
    base = load_file(models / "base" / "model.safetensors")[weight].double()
    errors = []
    for task in (1, 2, 3):
        tuned = load_file(models / f"tuned{task}" / "model.safetensors")[weight].double()
        U, s, Vh = torch.linalg.svd((tuned - base).float().double(), full_matrices=False)
        for k in range(len(s)):
            out = s[k] * U[:, k]
            errors.append(abs(out @ (M @ Vh[k] - out)))
    return float(torch.stack(errors).mean())


def test_stf_preserves_to_rounding_and_the_others_do_not(measured: Preservation) -> None:
    assert set(measured.error) == {"stf", *RIVALS, "stored"}
    assert measured.error["stf"] < 1e-5 * measured.mean_square
    assert measured.error["stored"] < 1e-4 * measured.mean_square
    for rival in ("linear", "task_arithmetic", "ties"):
        assert measured.error[rival] > 1e-2 * measured.mean_square


def test_errors_match_an_independent_computation(merged: Path, measured: Preservation) -> None:
    models = merged.parent / "models"
    base, *tuned = (
        load_file(models / name / "model.safetensors")[WEIGHT].double()
        for name in ("base", "tuned1", "tuned2", "tuned3")
    )
    total = sum((one - base for one in tuned), torch.zeros_like(base))
    for method, M in (("task_arithmetic", total), ("linear", total / 3)):
        expected = independent_error(merged, M, WEIGHT)
        assert measured.error[method] == pytest.approx(expected, rel=1e-3)
    written = load_file(merged / "model.safetensors")[WEIGHT].double()
    expected = independent_error(merged, (written - base) / 0.5, WEIGHT)
    assert measured.error["stored"] == pytest.approx(expected, rel=0.2)


def test_of_bfloat16_checkpoints_only_storing_rounds(tmp_path: Path) -> None:
    models = tiny_models(tmp_path / "models")
    for folder in (models.base, *models.tuned):
        path = folder / "model.safetensors"
        half = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
        save_file(half, path, {"format": "pt"})
    recipe = write_recipe(tmp_path / "recipe.yml", models, **{"lambda": 0.5})
    assert run("merge", recipe, tmp_path / "out", "--quiet").exit_code == 0
    finished = Finished(tmp_path / "out")
    weight = next(w for w in finished.weights() if w.name == WEIGHT)
    assert weight.out_dtype == torch.bfloat16
    found = measure_preservation(weight, finished.weight(WEIGHT))
    assert found.error["stf"] < 1e-5 * found.mean_square
    for rival in RIVALS:
        assert found.error[rival] > 1e-2 * found.mean_square
    base = load_file(models.base / "model.safetensors")[WEIGHT].double()
    stored = (load_file(tmp_path / "out" / "model.safetensors")[WEIGHT].double() - base) / 0.5
    expected = independent_error(tmp_path / "out", stored, WEIGHT)
    assert found.error["stored"] == pytest.approx(expected, rel=1e-3)
    rounding = torch.finfo(torch.bfloat16).eps * float(torch.linalg.norm(base)) / 0.5
    assert found.error["stored"] < rounding * found.mean_square**0.5


@pytest.mark.parametrize(
    ("family", "name", "parameters", "matrices"),
    [
        ("mixtral", "experts.down_proj", {}, 4),
        ("gpt2", "c_attn.weight", {"split": "columns 3"}, 3),
        ("gpt2", "c_attn.weight", {}, 1),
        ("llama", "up_proj.weight", {"rank": 0.5}, 1),
    ],
)
def test_stacks_and_fused_projections_are_measured_matrix_by_matrix(
    tmp_path: Path, family: str, name: str, parameters: dict[str, object], matrices: int
) -> None:
    settings = {key: {"value": value, "filter": name} for key, value in parameters.items()}
    recipe = write_recipe(tmp_path / "recipe.yml", tiny_models(tmp_path, family), **settings)
    weights = plan_weights(load_recipe(recipe).config, MergeOptions())
    weight = next(weight for weight in weights if weight.name.endswith(name))
    pieces = weight.split_tensor(torch.empty(weight.header.shape))
    found = measure_preservation(weight)
    assert len(pieces) == matrices
    kept = parameters.get("rank", 1.0)
    assert found.features == sum(3 * int(kept * min(piece.shape)) for piece in pieces)  # type: ignore[operator]
    assert found.error["stf"] < 1e-5 * found.mean_square
    assert found.error["ties"] > 1e-2 * found.mean_square


def test_every_superposed_weight_is_measured_and_listed(merged: Path) -> None:
    page = (merged / "stf-report.html").read_text(encoding="utf-8")
    names = set(load_file(merged / "model.safetensors"))
    assert all(f">{name}</th>" in page for name in names)
    assert "14 of 14 linear maps were" in " ".join(page.split())


def test_the_page_needs_nothing_but_itself(merged: Path) -> None:
    page = (merged / "stf-report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page
    assert "<link" not in page
    figures = sorted(path.name for path in (merged / "stf-report").iterdir())
    assert {"preservation.png", "interference.png", "spectra.png", "alpha.png"} <= set(figures)
    assert all((merged / "stf-report" / name).read_bytes()[:4] == b"\x89PNG" for name in figures)


class Outline(HTMLParser):
    """Collects what a screen reader needs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_accessible(merged: Path) -> None:
    outline = Outline((merged / "stf-report.html").read_text(encoding="utf-8"))
    assert outline.all("html") == [{"lang": "en"}]
    assert all(len(image["alt"] or "") > 20 for image in outline.all("img"))
    assert all("scope" in head for head in outline.all("th"))
    assert len(outline.all("main")) == len(outline.all("h1")) == 1
    targets = {link["href"] for link in outline.all("a")}
    ids = {f"#{attributes['id']}" for _, attributes in outline.tags if "id" in attributes}
    assert targets <= ids


def test_without_a_sample_no_model_is_read(merged: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(merged, tmp_path / "alone")
    shutil.rmtree(alone / "stf-report")
    text = (alone / "stf.lock.json").read_text(encoding="utf-8")
    (alone / "stf.lock.json").write_text(text.replace("models/", "gone/"), encoding="utf-8")
    page = tmp_path / "page.html"
    assert run("report", alone, "--sample", 0, "--output", page).exit_code == 0
    assert "preservation.png" not in {path.name for path in (tmp_path / "page").iterdir()}
    failed = run("report", alone)
    assert failed.exit_code == 1
    assert "no directory" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_missing_records_are_explained(merged: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(merged, tmp_path / "bare")
    (bare / "stf-diagnostics.jsonl").unlink()
    failed = run("report", bare)
    assert failed.exit_code == 1
    assert "stf-diagnostics.jsonl is missing: merge with mergekit-stf merge" in failed.stderr
    assert run("report", tmp_path / "nowhere").exit_code == 1


def test_a_missing_extra_is_named(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    failed = run("report", merged)
    assert failed.stderr == (
        "Error: the report needs matplotlib: pip install 'mergekit-stf[report]'\n"
    )


def test_the_report_leaves_the_lock_valid(merged: Path) -> None:
    assert run("verify", merged).exit_code == 0


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>"
    made = [replace(record, models=(f"{evil} $x$", "_b")) for record in records()]
    made[0] = replace(made[0], name=f"layers.0.{evil}")
    report = build_report(evil, f"base: {evil}", made, [])
    page = render(report, draw_plots(report))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_no_warning_without_a_reason() -> None:
    assert build_report("m", "", records(), []).notices == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"converged": False, "residual": 0.3}, "did not converge for 6 weights"),
        ({"cutoff": 0.4}, "contradict each other in 6 weights"),
        ({"cosine": ((1.0, 0.99), (0.99, 1.0))}, "changed 6 of 6 linear maps alike"),
        ({"norm_merged": 99.0}, "more than 2 × as long"),
        ({"norms": (1.0, 0.0)}, "2 b does not differ from the base"),
        ({"norms": (8.0, 2.0)}, "1 a changed the base 4.0 × as much as 2 b"),
    ],
)
def test_warnings_come_first(changes: dict[str, object], expected: str) -> None:
    report = build_report("m", "", records(**changes), [])
    assert any(expected in notice.what for notice in report.notices)
    page = render(report, {"cost": []})
    assert page.index(expected) < page.index('class="tiles"')


def test_a_report_without_solves_has_its_table() -> None:
    plain = Record(name="a.bias", rule="sum", models=("x",), seconds=0.0)
    report = build_report("m", "", [plain], [])
    assert "a.bias" in render(report, draw_plots(report))


def test_a_method_without_a_defined_error_is_drawn_without_it() -> None:
    error = {"stf": 0.0, "linear": float("nan"), "task_arithmetic": 0.1, "ties": 0.2}
    found = Preservation("model.layers.0.mlp.up_proj.weight", "stf", 12, 1.0, error)
    report = build_report("m", "", records(1), [found])
    assert "preservation" in draw_plots(report)
    assert "<td>nan</td>" in render(report, draw_plots(report))


def test_a_sample_holds_every_kind_and_both_ends() -> None:
    names = [f"layers.{n}.{kind}.weight" for n in range(40) for kind in ("q", "k", "up")]
    chosen = spread(names, 12)
    assert len(chosen) == 12
    assert {layer_and_kind(name)[1] for name in chosen} == {
        "layers.*.q",
        "layers.*.k",
        "layers.*.up",
    }
    assert {0, 39} <= {layer_and_kind(name)[0] for name in chosen}
    assert spread(names, 1000) == names
    assert len(spread(names, 1)) == 3


def test_names_are_shortened_to_what_differs() -> None:
    kinds = ["model.layers.*.mlp.up", "model.layers.*.mlp.down", "model.layers.*.attn.q"]
    assert without_common_start(kinds) == ["mlp.up", "mlp.down", "attn.q"]
    assert without_common_start(["a.b"]) == ["a.b"]
    assert layer_and_kind("h.0.attn.c_attn.weight") == (0, "h.*.attn.c_attn")
    assert layer_and_kind("classifier.weight") == (None, "classifier")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (0.0, "0"), (1.23456, "1.23"), (1e-9, "1.00e-09")]
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert significant(value) == shown


def test_the_table_sorts_in_a_browser(merged: Path, tmp_path: Path) -> None:
    script = """
      const heads = [...document.querySelectorAll("#table thead th")];
      const keys = (column) => [...document.querySelectorAll("#table tbody tr")]
        .map((row) => row.cells[column].dataset.key);
      const press = (column) => {
        heads[column].querySelector("button").click();
        return keys(column);
      };
      const features = heads.findIndex((head) => head.textContent === "Features");
      return { up: press(features), down: press(features), names: press(0),
               state: heads.map((head) => head.getAttribute("aria-sort")) };
    """
    found = ask(merged / "stf-report.html", script, tmp_path)
    up = [int(key) for key in found["up"] if key]
    down = [int(key) for key in found["down"] if key]
    assert (up, down) == (sorted(up), sorted(up, reverse=True))
    assert len(up) == 14
    assert found["up"][-1] == found["down"][-1] == ""
    assert found["names"] == sorted(found["names"])
    assert found["state"] == ["ascending"] + ["none"] * 10


def test_the_table_filters_in_a_browser(merged: Path, tmp_path: Path) -> None:
    script = """
      const count = () => [...document.querySelectorAll("#table tbody tr")]
        .filter((row) => row.offsetParent !== null).length;
      const needle = document.getElementById("needle"), rule = document.getElementById("rule");
      const say = () => document.getElementById("shown").textContent;
      const type = (text) => { needle.value = text; needle.dispatchEvent(new Event("input")); };
      const all = [count(), say()];
      type("MLP"); const mlp = [count(), say()];
      rule.value = "mean"; rule.dispatchEvent(new Event("change")); const none = [count(), say()];
      type(""); const mean = [count(), say()];
      return { all, mlp, none, mean };
    """
    found = ask(merged / "stf-report.html", script, tmp_path)
    assert found["all"] == [21, "21 of 21 weights"]
    assert found["mlp"] == [6, "6 of 21 weights"]
    assert found["none"] == [0, "0 of 21 weights"]
    assert found["mean"] == [5, "5 of 21 weights"]


def test_the_page_fits_a_narrow_screen(merged: Path, tmp_path: Path) -> None:
    script = """
      const root = document.documentElement;
      return { width: root.clientWidth, content: root.scrollWidth,
               drawn: [...document.images].every((image) => image.naturalWidth > 0) };
    """
    found = ask(merged / "stf-report.html", script, tmp_path, width=400)
    assert found["content"] <= found["width"] <= 500
    assert found["drawn"]


def test_a_resumed_merge_has_complete_records(merged: Path, tmp_path: Path) -> None:
    recipe = merged.parent / "recipe.yml"
    store = tmp_path / "store"
    for name in ("first", "second"):
        assert run("merge", recipe, tmp_path / name, "--quiet", "--store", store).exit_code == 0
    first, second = (Finished(tmp_path / name).records() for name in ("first", "second"))
    timed = {"seconds", "peak_rss"}
    first_facts, second_facts = (
        [{k: v for k, v in asdict(record).items() if k not in timed} for record in found]
        for found in (first, second)
    )
    assert first_facts == second_facts
    assert sum(bool(record.routes) for record in second) == 14


@pytest.mark.parametrize("sample", ["0", "48"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_report_of_a_merge_in_which_nothing_differs(
    tmp_path: Path, family: str, sample: str
) -> None:
    models = tiny_models(tmp_path / "models", family)
    for tuned in models.tuned:
        shutil.copytree(models.base, tuned, dirs_exist_ok=True)
    recipe = write_recipe(tmp_path / "recipe.yml", models)
    done = run("merge", recipe, tmp_path / "out", "--quiet", "--no-copy-tokenizer")
    assert done.exit_code == 0, done.output
    done = run("report", tmp_path / "out", "--quiet", "--sample", sample)
    assert done.exit_code == 0, done.output
    assert "0 weights, 1 warnings" in done.output
    page = (tmp_path / "out" / "stf-report.html").read_text()
    assert "No weight of any model differs from the base" in page


def test_weights_of_one_merge_may_come_from_different_models() -> None:
    others = [replace(record, models=("/m/c", "/m/d")) for record in records(2)]
    three = [replace(record, models=("/m/a", "/m/b", "/m/c"), routes=()) for record in others]
    report = build_report("out", "", [*others, *records(3), *three], [])
    assert list(report.labels) == ["1 a", "2 b"]
    assert [record.models for record in report.comparable] == [("/m/a", "/m/b")] * 3
    assert "interference" in draw_plots(report)


def test_a_folder_from_elsewhere_runs_no_code_and_asks_no_hub(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(merged, tmp_path / "out")
    lock = json.loads((tmp_path / "out" / "stf.lock.json").read_text())
    lock["options"]["trust_remote_code"] = True
    lock["recipe"] = lock["recipe"].replace(str(merged.parent / "models"), "some")
    (tmp_path / "out" / "stf.lock.json").write_text(json.dumps(lock))

    def network(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("socket.getaddrinfo", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    seen: list[MergeOptions] = []
    for name in ("plan_weights", "input_models"):
        monkeypatch.setattr(finished, name, lambda _, options: seen.append(options) or [])
    assert run("report", tmp_path / "out", "--quiet").exit_code == 0
    assert [options.trust_remote_code for options in seen] == [False, False]
    monkeypatch.undo()
    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    done = run("report", tmp_path / "out", "--quiet")
    assert done.exit_code == 1
    assert "asked the network" not in done.output
    assert "is not in the cache of hub models on this machine" in done.output


def test_a_recipe_that_is_no_utf_8(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / "stf.lock.json").unlink()
    (tmp_path / "out" / "mergekit_config.yml").write_bytes(b"\xff")
    done = run("report", tmp_path / "out", "--quiet")
    assert done.exit_code == 1
    assert "mergekit_config.yml: cannot be read: not UTF-8 text" in done.output
