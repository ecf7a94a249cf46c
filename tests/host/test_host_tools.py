"""Every command of mergekit does with the package installed what it does without it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.environments import ROOT, run
from tests.host.classes import configuration
from tests.host.models import Checkpoints, build, save_model
from tests.host.tools import LOG, commands

pytestmark = pytest.mark.slow

CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama-biased": "LlamaForCausalLM:biases",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "neox": "GPTNeoXForCausalLM",
}
GAINED = (
    "mergekit-extract-lora of llama-biased",
    "mergekit-yaml linear of llama-biased",
    "mergekit-yaml linear of neox",
)
"""Cases that the host's own tables lose weights in, or refuse."""

BROKEN = {"bakllama", "mergekit-layershuffle", "mergekit-evolve --help"}
"""Commands of mergekit 0.1.5 that fail by themselves; the last lacks packages of its own."""


@dataclass(frozen=True)
class Outcome:
    """What is left of a command: its exit code, its last words, and its files."""

    code: int
    last: str
    files: dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """The cases, run with and without the hook."""

    folder: Path
    models: dict[str, Checkpoints]
    codes: dict[str, dict[str, int]]
    ours: dict[str, bool]

    def files(self, side: str, label: str) -> dict[str, bytes]:
        """Return what a command wrote."""
        top = self.folder / side / label
        paths = (path for path in top.rglob("*") if path.is_file() and path.name != LOG)
        return {path.relative_to(top).as_posix(): path.read_bytes() for path in paths}

    def weights(self, side: str, label: str) -> dict[str, torch.Tensor]:
        """Return the tensors that a command wrote, none if it failed."""
        found = (self.folder / side / label / "out").glob("*.safetensors")
        return {name: tensor for path in found for name, tensor in load_file(path).items()}

    def outcome(self, side: str, label: str) -> Outcome:
        """Return what can be compared: the lines of a model card have no order in mergekit."""
        files: dict[str, Any] = self.files(side, label)
        for name in files:
            if name.endswith("README.md"):
                files[name] = sorted(files[name].splitlines())
        code = self.codes[side][label]
        return Outcome(code, self.log(side, label).splitlines()[-1] if code else "", files)

    def log(self, side: str, label: str) -> str:
        """Return what a command said."""
        return (self.folder / side / label / LOG).read_text(encoding="utf-8")


def add_tokenizer(folder: Path, size: int) -> None:
    """Give a model a tokenizer of so many words, of which every second is common to all."""
    words = {f"w{i if i % 2 else i * size}": i for i in range(size)}
    plain = Tokenizer(WordLevel(words, unk_token="w0"))
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)


def recipes(models: dict[str, Checkpoints]) -> dict[str, Any]:
    """Return the recipe of each case that needs one, a list where it has several documents."""
    found: dict[str, Any] = {}
    for name in CLASSES:
        first, second = map(str, models[name].tuned)
        entries = [{"model": first}, {"model": second}]
        found[f"mergekit-yaml linear of {name}"] = {
            "merge_method": "linear",
            "models": [{**entry, "parameters": {"weight": 0.5}} for entry in entries],
        }
    base, (first, second) = str(models["llama"].base), map(str, models["llama"].tuned)
    ties = {
        "merge_method": "ties",
        "base_model": base,
        "models": [
            {"model": m, "parameters": {"density": 0.5, "weight": 1}} for m in (first, second)
        ],
    }
    found["mergekit-yaml ties"] = ties
    found["mergekit-pytorch"] = {
        **ties,
        "base_model": f"{base}/model.safetensors",
        "models": [{**one, "model": f"{one['model']}/model.safetensors"} for one in ties["models"]],
    }
    slices = [
        {"sources": [{"model": first, "layer_range": [0, 1]}]},
        {"sources": [{"model": second, "layer_range": [0, 2]}]},
    ]
    found["mergekit-yaml passthrough"] = {"merge_method": "passthrough", "slices": slices}
    found["mergekit-multi"] = [
        {**ties, "name": "inner"},
        {
            "merge_method": "linear",
            "models": [{"model": one, "parameters": {"weight": 0.5}} for one in ("inner", first)],
        },
    ]
    layers = [{"model": first, "start": 0, "end": 1}, {"model": second, "start": 1, "end": 2}]
    found["bakllama"] = {"layer_slices": layers}
    for kind, name in (("mixtral", "mistral"), ("deepseek", "llama"), ("qwen3", "qwen3")):
        experts = [{"source_model": str(folder)} for folder in models[name].tuned]
        found[f"mergekit-moe {kind}"] = {
            "base_model": str(models[name].base),
            "gate_mode": "random",
            "architecture": kind,
            "experts": experts,
        }
    return found


def cases(models: dict[str, Checkpoints], folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the command line of each case; what it writes goes below the current folder."""
    folder.mkdir()
    for label, data in recipes(models).items():
        path = folder / f"{label}.yml"
        documents = data if isinstance(data, list) else [data]
        path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
        tool = label.split()[0]
        if tool == "mergekit-multi":
            yield label, [tool, str(path), "--out-path", "out", "--intermediate-dir", "parts/of/it"]
        else:
            yield label, [tool, str(path), "out"]
    for name, made in models.items():
        of = ["--model", str(made.tuned[0]), "--base-model", str(made.base), "--out-path", "out"]
        label = f"mergekit-extract-lora of {name}"
        yield label, ["mergekit-extract-lora", *of, "--max-rank", "4"]
    for name in ("llama", "qwen3", "gemma2"):
        model, donor = str(models[name].base), str(models["mistral"].base)
        label = f"mergekit-tokensurgeon of {name}"
        yield label, ["mergekit-tokensurgeon", model, donor, "out", "-k", "4"]
    first, second = map(str, models["llama"].tuned)
    shuffle = ["-m", first, "-m", second, "-w", "0.5", "-w", "0.5", "--write-yaml", "used.yml"]
    yield "mergekit-layershuffle", ["mergekit-layershuffle", "out", *shuffle]
    legacy = ["--merge", first, "--merge", second, "--base-model", str(models["llama"].base)]
    yield (
        "mergekit-legacy",
        ["mergekit-legacy", "out", *legacy, "--density", "0.5", "--weight", "1"],
    )
    for tool in sorted(commands()):
        yield f"{tool} --help", [tool, "--help"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("tools")
    models = {}
    for name, label in CLASSES.items():
        model = build(label.split(":")[0], configuration(label))
        models[name] = save_model(model, folder / "models" / name, tasks=2)
        for part in (models[name].base, *models[name].tuned):
            add_tokenizer(part, 30 if name == "mistral" else 40)
    words = folder / "cases.json"
    words.write_text(json.dumps(dict(cases(models, folder / "recipes"))), encoding="utf-8")
    codes, ours = {}, {}
    for side, switch in (("with", "1"), ("without", "0")):
        (folder / side).mkdir()
        answer = run(
            [sys.executable, "-m", "tests.host.tools", str(words)],
            cwd=folder / side,
            PYTHONPATH=str(ROOT),
            PYTHONHASHSEED="0",
            HF_HUB_OFFLINE="1",
            MERGEKIT_STF_AUTOLOAD=switch,
        )
        found = json.loads(answer.stdout.splitlines()[-1])
        codes[side], ours[side] = found["codes"], found["ours"]
    return Runs(folder, models, codes, ours)


def test_the_hook_alone_decides(runs: Runs) -> None:
    assert runs.ours == {"with": True, "without": False}


@pytest.mark.parametrize("tool", sorted(commands()))
def test_a_command_does_what_it_does_without_us(runs: Runs, tool: str) -> None:
    labels = [label for label in runs.codes["with"] if label.split()[0] == tool]
    assert len(labels) > (tool != "mergekit-evolve")
    for label in labels:
        if label in GAINED:
            continue
        here, there = (runs.outcome(side, label) for side in ("with", "without"))
        assert here == there, label
        assert there.code == (label in BROKEN), runs.log("without", label)


@pytest.mark.parametrize("label", GAINED)
def test_what_the_host_loses_by_itself_is_kept(runs: Runs, label: str) -> None:
    """The biases of a Llama, and a GPT-NeoX at all: its table asks for buffers of old files."""
    name = label.split()[-1]
    made, alone = (runs.weights(side, label) for side in ("with", "without"))
    assert made.keys() - alone.keys()
    assert all(made[key].equal(alone[key]) for key in alone)
    base, first, second = (
        load_file(folder / "model.safetensors")
        for folder in (runs.models[name].base, *runs.models[name].tuned)
    )
    for key in made.keys() - alone.keys():
        if "lora_B" in key:
            plain = key.removeprefix("base_model.model.").replace("lora_B.bias", "bias")
            assert made[key].equal(first[plain] - base[plain])
        else:
            assert torch.allclose(made[key], (first[key] + second[key]) / 2)
