"""``mergekit-stf lora`` from the command line, beside what ``mergekit-yaml`` makes of adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file

from mergekit_stf.cli.main import main
from mergekit_stf.host.diagnostics import records as diagnostics
from tests.host import peft_adapters as made
from tests.host.models import gpt2, llama, save_model

MODELS = {"llama": (llama, made.LLAMA_LINEAR), "gpt2": (gpt2, made.GPT2_LINEAR)}


@pytest.fixture(scope="module", params=list(MODELS))
def config(
    request: pytest.FixtureRequest, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Write a base, two adapters and a recipe over them, and return the recipe."""
    build, targets = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    base = save_model(build(), root, tasks=0, layout=layout).base
    adapters = [
        made.save_adapter(base, root / f"adapter{seed}", seed, target_modules=targets)
        for seed in (1, 2)
    ]
    content = made.recipe(base, made.on_base(base, adapters), parameters={"weight": 0.9})
    return made.write(content, root / "recipe.yml")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["lora", *map(str, arguments)])


def test_model_equals_what_mergekit_yaml_merges(config: Path, tmp_path: Path) -> None:
    result = run(config, tmp_path / "native")
    assert result.exit_code == 0, result.output
    assert "model, 2 adapters merged in" in result.output
    options = ["--lora-merge-cache", str(tmp_path / "cache"), "--lora-merge-dtype", "float32"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers, called by the host
        CliRunner().invoke(
            mergekit_yaml,
            [str(config), str(tmp_path / "host"), *options, "--quiet"],
            catch_exceptions=False,
        )
    found, expected = made.tensors(tmp_path / "native"), made.tensors(tmp_path / "host")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = torch.linalg.norm(found[name] - tensor) / torch.linalg.norm(tensor)
        assert error <= 1e-5, name
    made.load(tmp_path / "native")


def test_adapter_is_reproducible(config: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = run(config, tmp_path / name, "--adapter")
        assert result.exit_code == 0, result.output
        assert "adapter of rank 6, 2 adapters merged" in result.output
    described = {"README.md", "mergekit_config.yml", "stf-diagnostics.jsonl"}
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {*files} == {"adapter_config.json", "adapter_model.safetensors", *described}
    for name in {*files} - described:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # PEFT holds a set, whose order differs between processes


def test_truncation_prints_its_error(config: Path, tmp_path: Path) -> None:
    result = run(config, tmp_path / "out", "--adapter", "--max-rank", 2)
    assert result.exit_code == 0, result.output
    assert "adapter of rank 2" in result.output
    assert "truncation error" in result.output
    assert "at worst" in result.output


def test_mistakes_are_one_line(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "out", "--max-rank", 2).exit_code == 2
    result = run(config, config.parent)
    assert result.exit_code == 1
    assert "is there already" in result.output
    assert run(tmp_path / "no.yml", tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()


def test_force_replaces_an_earlier_output_and_quiet_says_nothing(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(config, out, "--adapter", "--lock", "--quiet").exit_code == 0
    result = run(config, out, "--lock", "--force", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert not list(out.glob("adapter*"))
    (out / "old").touch()
    assert "holds old, which" in run(config, out, "--force").output
    (out / "stf.lock.json").unlink()
    assert "is not known to be an earlier output" in run(config, out, "--force").output
    assert (out / "old").exists()


def test_damped_weights_are_said_aloud(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = made.yaml.safe_load(config.read_text())
    first = content["models"][0]["model"]
    noisy = shutil.copytree(first.partition("+")[2], tmp_path / "noisy")
    stored = load_file(noisy / "adapter_model.safetensors")
    torch.manual_seed(5)
    noised = {k: 1.05 * v + 1e-3 * torch.randn_like(v) for k, v in stored.items()}
    save_file(noised, noisy / "adapter_model.safetensors")
    content["models"] = [{"model": first}, {"model": f"{content['base_model']}+{noisy}"}]
    result = run(made.write(content, tmp_path / "recipe.yml"), tmp_path / "out", "--quiet")
    assert result.exit_code == 0, result.output
    first, last = (record.message for record in caplog.records if record.name == "mergekit_stf")
    assert f"adapter1 and {noisy} ask for contradicting" in first
    assert "weights were ill-posed and damped" in last


@pytest.mark.parametrize("options", [[], ["--adapter"], ["--adapter", "--max-rank", "2"]])
def test_lock_is_verified_and_rebuilt(options: list[str], config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(config, out, "--lock", *options)
    assert result.exit_code == 0, result.output
    found = CliRunner().invoke(main, ["verify", str(out), "--rebuild"])
    assert found.exit_code == 0, found.output
    assert "merged again to the same bytes" in found.output
    weights = next(out.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    found = CliRunner().invoke(main, ["verify", str(out)])
    assert found.exit_code == 3
    assert f"output {weights.name}: other bytes" in found.output


def test_output_describes_itself(config: Path, tmp_path: Path) -> None:
    for name, library, options in (("m", "transformers", []), ("a", "peft", ["--adapter"])):
        assert run(config, tmp_path / name, "--quiet", *options).exit_code == 0
        text = (tmp_path / name / "README.md").read_text()
        assert f"library_name: {library}" in text
        assert "stf.lock.json" not in text
        records = diagnostics.read_records(tmp_path / name / "stf-diagnostics.jsonl")
        assert records
        for record in records:
            assert len(record.models) == len(record.norms) == len(record.kept) == 2
            assert record.converged


def test_report_shows_the_merge(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "out", "--quiet").exit_code == 0
    result = CliRunner().invoke(main, ["report", str(tmp_path / "out"), "--sample", "0"])
    assert result.exit_code == 0, result.output
    assert "adapter1" in (tmp_path / "out" / "stf-report.html").read_text()
    result = CliRunner().invoke(main, ["report", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "say --sample 0" in result.output
