"""A method in a file of its own goes through every command, with no edit anywhere else.

The method is `tests/toy_method.py`. Each command runs in a process of its own that imports it, and
what comes out is compared with the method in float64.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from mergekit_stf.host.diagnostics.records import FILE_NAME, Record, read_records
from tests import oracle, processes
from tests.host import peft_adapters
from tests.host.merging import State, parameters, relative_error, rules_of
from tests.host.models import Checkpoints, llama, save_family, save_model

TOY = Path(__file__).with_name("toy_method.py")
NAME = "leading_sum"
LAMBDA, RANK = 0.7, 3
WEIGHTS, DENSITIES = (1.0, 0.5), (1.0, 0.6)
ENTRIES = "*.stf.safetensors"
TOLERANCE = 1e-5


def command(*arguments: object, log: Path, program: str = "mergekit-stf", toy: Path = TOY) -> str:
    """Run a program that knows the toy and must succeed; return what it says."""
    code, text = processes.run(*arguments, log=log, program=program, first=toy)
    assert code == 0, text
    return text


def leading(M: np.ndarray, rank: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    result: np.ndarray = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    return result


def merged(
    base: np.ndarray, tuned: Sequence[np.ndarray], rule: str, scale: float, rank: int
) -> np.ndarray:
    """Return one weight as the toy merges it."""
    if rule != "superpose":
        result: np.ndarray = oracle.merge_weight(base, tuned, rule, WEIGHTS, DENSITIES, scale)
        return result
    tasks = zip(tuned, WEIGHTS, DENSITIES, strict=True)
    deltas = [oracle.trim(weight * (P - base), density) for P, weight, density in tasks]
    return base + scale * sum(leading(M, rank) for M in deltas)


def check_values(models: Checkpoints, out: Path, scale: float = LAMBDA, rank: int = RANK) -> None:
    """Compare every weight of an output with the toy in float64."""
    kind = transformers.LlamaForCausalLM
    rules = rules_of(llama())
    base, *tuned = (_float64(parameters(f, kind)) for f in (models.base, *models.tuned))
    found = parameters(out, kind)
    assert found.keys() == base.keys()
    assert sum(rule == "superpose" for rule in rules.values()) == 14
    for name, P in base.items():
        wanted = merged(P, [one[name] for one in tuned], rules[name], scale, rank)
        error = relative_error(found[name], torch.from_numpy(wanted), torch.from_numpy(P))
        assert error <= TOLERANCE, (name, error)


def _float64(state: State) -> Mapping[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("models")
    return save_family("llama", root, tasks=2, dtype=torch.bfloat16, layout="sharded")


@pytest.fixture(scope="module")
def recipe(models: Checkpoints) -> Path:
    settings = zip(models.tuned, WEIGHTS, DENSITIES, strict=True)
    content: dict[str, Any] = {
        "merge_method": NAME,
        "base_model": str(models.base),
        "models": [
            {"model": str(folder), "parameters": {"weight": weight, "density": density}}
            for folder, weight, density in settings
        ],
        "parameters": {"lambda": LAMBDA, "rank": RANK},
        "dtype": "float32",
    }
    path = models.base.parent / "recipe.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by ``mergekit-stf merge``, in small shards."""
    folder = tmp_path_factory.mktemp("merged")
    command("merge", recipe, folder / "out", "--out-shard-size", 16000, log=folder / "log")
    return folder / "out"


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def linear(folder: Path) -> list[Record]:
    return [record for record in read_records(folder / FILE_NAME) if record.routes]


def test_it_is_thirty_lines_and_nothing_of_the_package_names_it() -> None:
    assert len(TOY.read_text("utf-8").splitlines()) <= 30
    package = TOY.parent.parent / "mergekit_stf"
    assert not [path for path in package.rglob("*.py") if NAME in path.read_text("utf-8")]


def test_mergekit_yaml(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    command(recipe, tmp_path / "out", "--quiet", program="mergekit-yaml", log=tmp_path / "log")
    check_values(models, tmp_path / "out")


def test_plan(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    text = command("plan", recipe, "--out", tmp_path / "out", "--json", log=tmp_path / "log")
    plan = json.loads(text[text.index("{") :])
    assert {row["rule"]: row["weights"] for row in plan["rules"]} == {
        "mean": 5, "merge": 14, "sum": 2,
    }  # fmt: skip
    assert plan["models"] == sorted(map(str, models.tuned))
    assert plan["estimate"]["store"] > 0


def test_merge(models: Checkpoints, out: Path) -> None:
    assert len(shards(out)) == 2
    check_values(models, out)
    records = linear(out)
    assert len(records) == 14
    assert {(record.method, record.rule, record.kept) for record in records} == {
        (NAME, "merge", (RANK, RANK))
    }
    for record in records:
        assert record.condition is record.residual is record.converged is None
        assert record.norm_merged == pytest.approx(record.norm_sum, rel=1)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert NAME in card
    assert "STF" not in card


def test_resume(recipe: Path, out: Path, tmp_path: Path) -> None:
    again, log = tmp_path / "out", tmp_path / "log"
    options = ("merge", recipe, again, "--out-shard-size", 16000)
    running = processes.start(*options, log=log, first=TOY)
    running.until(tmp_path / "out.stf-work" / "store", ENTRIES)
    running.process.kill()
    assert running.wait() == -signal.SIGKILL
    stored = len(list((tmp_path / "out.stf-work" / "store").glob(ENTRIES)))
    text = command(*options, log=log)
    assert stored > 0
    assert f"{stored} matrices found" in text
    assert shards(again) == shards(out)


@pytest.mark.parametrize(
    ("source", "parameters", "found"),
    [
        ({}, {}, 14),
        ({}, {"lambda": 0.2}, 14),
        ({}, {"rank": 2}, 0),
        ({"a toy of the tests": "a toy of the test"}, {}, 0),
    ],
    ids=["same", "lambda", "option", "edited"],
)
def test_the_store_knows_source_and_options(
    source: dict[str, str],
    parameters: dict[str, float],
    found: int,
    store: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Only what was merged by the same source with the same options is found, at any lambda."""
    folder, content = store
    toy, text = tmp_path / TOY.name, TOY.read_text("utf-8")
    for old, new in source.items():
        assert old in text
        text = text.replace(old, new)
    toy.write_text(text, encoding="utf-8")
    own = content["parameters"] | parameters
    recipe = peft_adapters.write(content | {"parameters": own}, tmp_path / "recipe.yml")
    shutil.copytree(folder, tmp_path / "store")
    options = ("--store", tmp_path / "store")
    said = command("merge", recipe, tmp_path / "out", *options, toy=toy, log=tmp_path / "log")
    assert f"{found} matrices found, {14 - found} written" in said


def test_the_store_knows_the_method_s_name(
    store: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Two methods of one file and of the same options do not share what they merged."""
    calls = "register(Again())\nplugin.register_with_mergekit()\n"
    again = f'class Again(LeadingSum):\n    name = "again"\n\n\n{calls}'
    toy = tmp_path / TOY.name
    toy.write_text(TOY.read_text("utf-8") + "\n\n" + again, encoding="utf-8")
    for number, (name, found) in enumerate(((NAME, 0), ("again", 0), ("again", 14))):
        recipe = peft_adapters.write(store[1] | {"merge_method": name}, tmp_path / "recipe.yml")
        words = ("merge", recipe, tmp_path / str(number), "--store", tmp_path / "store")
        said = command(*words, toy=toy, log=tmp_path / "log")
        assert f"{found} matrices found, {14 - found} written" in said


@pytest.fixture(scope="module")
def store(
    models: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A store of a merge by the toy, and the recipe of that merge."""
    folder = tmp_path_factory.mktemp("stored")
    names = [str(path) for path in models.tuned]
    parameters = {"lambda": LAMBDA, "rank": RANK}
    content = peft_adapters.recipe(models.base, names, merge_method=NAME, parameters=parameters)
    recipe = peft_adapters.write(content, folder / "recipe.yml")
    options = ("--store", folder / "store", "--quiet")
    command("merge", recipe, folder / "out", *options, log=folder / "log")
    return folder / "store", content


def test_sweep(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    grid = ("--lambda", "0.5,1", "--rank", "2,0.5")
    command("sweep", recipe, tmp_path / "grid", *grid, log=tmp_path / "log")
    for scale in (0.5, 1.0):
        for rank, kept in ((2, 2), (0.5, 8)):
            folder = tmp_path / "grid" / f"rank-{rank:g}_lambda-{scale:g}"
            check_values(models, folder, scale, kept)


@pytest.mark.parametrize("form", ["model", "adapter"])
def test_lora(form: str, tmp_path: Path) -> None:
    base = save_model(llama(), tmp_path, tasks=0, layout="sharded").base
    adapters = [
        peft_adapters.save_adapter(
            base, tmp_path / f"a{seed}", seed, target_modules=peft_adapters.LLAMA_LINEAR
        )
        for seed in (1, 2)
    ]
    on_base = peft_adapters.on_base(base, adapters)
    content = peft_adapters.recipe(base, on_base, parameters={"lambda": LAMBDA, "rank": 2})
    recipe = peft_adapters.write(content | {"merge_method": NAME}, tmp_path / "recipe.yml")
    out, log = tmp_path / "out", tmp_path / "log"
    options = ["--adapter"] if form == "adapter" else []
    text = command("lora", recipe, out, "--lock", *options, log=log)
    assert {record.routes for record in linear(out)} == {("factored", "factored")}
    assert {record.kept for record in linear(out)} == {(2, 2)}
    full = out
    if form == "adapter":
        assert "adapter of rank 4" in text
        full = peft_adapters.save_full(base, out, tmp_path / "full")
    kind = transformers.LlamaForCausalLM
    copies = [peft_adapters.save_full(base, a, tmp_path / f"full-{a.name}") for a in adapters]
    start, *tuned = (_float64(parameters(folder, kind)) for folder in (base, *copies))
    found = parameters(full, kind)
    for name in found:
        deltas = [one[name] - start[name] for one in tuned]
        wanted = start[name] + LAMBDA * sum(leading(M, 2) for M in deltas if M.any())
        error = relative_error(found[name], torch.from_numpy(wanted), torch.from_numpy(start[name]))
        assert error <= TOLERANCE, (name, error)
    assert "merged again to the same bytes" in command("verify", out, "--rebuild", log=log)


def test_verify(out: Path, tmp_path: Path) -> None:
    command("verify", out, log=tmp_path / "log")
    said = command("verify", out, "--rebuild", log=tmp_path / "log")
    assert "merged again to the same bytes" in said


def test_report(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command("report", out, "--output", page, "--quiet", log=tmp_path / "log")
    text = page.read_text(encoding="utf-8")
    assert f"What merging with <code>{NAME}</code> did" in text
    assert "<code>stf</code>" not in text
    assert "of stf" not in text
