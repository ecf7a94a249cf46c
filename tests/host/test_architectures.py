"""Every class of ``docs/architectures.md``, made tiny and merged, against the float64 oracle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from mergekit.architecture import json_definitions
from mergekit.architecture.json_definitions import JSON_ARCHITECTURES, NAME_TO_ARCH
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

from mergekit_stf.host import architectures
from mergekit_stf.host.architectures.exact import ExactArchitecture
from mergekit_stf.host.architectures.fitted import FittedArchitecture
from mergekit_stf.host.architectures.loading import ParameterNames, hollow_model
from tests.environments import run
from tests.host import audit, tables
from tests.host.classes import AUDITED, configuration
from tests.host.merging import LAMBDA, merge, recipe, worst_error
from tests.host.models import FAMILIES, Checkpoints, build, perturb, save_family, save_model

OURS = (ExactArchitecture, FittedArchitecture)

RENAMED = [
    "BeitForImageClassification",
    "CLIPModel",
    "CLIPVisionModel",
    "DeepseekV3ForCausalLM:dense first",
    "Gemma3ForConditionalGeneration:no head",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "MixtralForCausalLM",
    "PaliGemmaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "SiglipModel",
    "ViTForImageClassification",
]
"""Classes whose files may name a weight otherwise than the model does."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_family_merges_through_mergekit_yaml_and_meets_the_oracle(
    family: Checkpoints, density: float, tmp_path: Path
) -> None:
    merge(recipe(family, density), tmp_path / "out")
    error, name = worst_error(family, tmp_path / "out", density)
    assert error < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("label", AUDITED)
def test_audited_class_merges_whole(label: str, tmp_path: Path) -> None:
    model = build(label.split(":")[0], configuration(label))
    checkpoints = save_model(model, tmp_path, tasks=2)
    merge(recipe(checkpoints), tmp_path / "out")
    error, name = worst_error(checkpoints, tmp_path / "out", 1.0)
    assert error < 1e-4, name


@pytest.mark.parametrize("layout", ["as in the model", "with every prefix"])
@pytest.mark.parametrize("label", RENAMED)
def test_other_spellings_of_a_checkpoint_merge_whole(
    label: str, layout: str, tmp_path: Path
) -> None:
    model = build(label.split(":")[0], configuration(label))
    folders = [tmp_path / name for name in ("base", "tuned1", "tuned2")]
    for seed, folder in enumerate(folders):
        tuned = perturb(model, seed) if seed else model
        tuned._weight_conversions = get_model_conversion_mapping(tuned, add_legacy=False)
        tuned.save_pretrained(folder, save_original_format=layout == "with every prefix")
    checkpoints = Checkpoints(folders[0], tuple(folders[1:]))
    merge(recipe(checkpoints), tmp_path / "out")
    error, name = worst_error(checkpoints, tmp_path / "out", 1.0)
    assert error < 1e-5, name


@pytest.mark.parametrize(
    ("label", "head"),
    [
        ("CohereForCausalLM", "lm_head.weight"),
        ("Ernie4_5_MoeForCausalLM", "lm_head.weight"),
        ("Starcoder2ForCausalLM", "lm_head.weight"),
        ("T5ForConditionalGeneration:1.1", "lm_head.weight"),
        ("WhisperForConditionalGeneration", "proj_out.weight"),
    ],
)
def test_a_head_that_files_hold_beside_the_embedding_is_merged(
    label: str, head: str, tmp_path: Path
) -> None:
    """Its class ties the two, but not where a checkpoint has both with values of their own."""
    model = build(label.split(":")[0], configuration(label))
    assert head in model.all_tied_weights_keys
    checkpoints = save_model(model, tmp_path, tasks=2)
    heads = []
    for folder in (checkpoints.base, *checkpoints.tuned):
        tensors = load_file(folder / "model.safetensors")
        heads.append(torch.randn(40, 16))
        save_file(tensors | {head: heads[-1]}, folder / "model.safetensors", {"format": "pt"})
    merge(recipe(checkpoints), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[head]
    base, *tuned = heads
    assert torch.allclose(merged, base + LAMBDA * sum(one - base for one in tuned), atol=1e-6)


@pytest.mark.parametrize("label", AUDITED)
def test_the_list_for_one_model_names_nothing_that_it_lacks(label: str) -> None:
    architectures.register_tables()
    config = configuration(label)
    for table in NAME_TO_ARCH.get(label.split(":")[0], []):
        if any(isinstance(m.architecture, OURS) for m in table.modules.values()):
            names = ParameterNames(hollow_model(config))
            assert [w.name for w in table.all_weights(config) if not names.of(w.name)] == []


def test_a_model_that_cannot_be_built_keeps_its_whole_list(
    caplog: pytest.LogCaptureFixture,
) -> None:
    architectures.register_tables()
    config = configuration("LlamaForCausalLM")
    config.pad_token_id = config.vocab_size + 1
    (table,) = NAME_TO_ARCH["LlamaForCausalLM"]
    assert len(table.all_weights(config)) == 35
    assert "transformers cannot build this model" in caplog.text


def test_our_tables_can_be_switched_off() -> None:
    code = (
        "from mergekit.architecture import json_definitions as j\n"
        "raw = j._load_all_architectures()[1]\n"
        "import mergekit.merge_methods as m\n"
        "print(j.NAME_TO_ARCH == raw, 'stf' in [x.spec.name for x in m.registered_methods()])"
    )
    outcome = run([sys.executable, "-c", code], MERGEKIT_STF_TABLES="0")
    assert outcome.stdout.split("\n")[0] == "True True"
    assert json_definitions._load_all_architectures()[1] != NAME_TO_ARCH


@pytest.mark.parametrize("stem", tables.TABLES)
def test_tables_are_the_ones_that_transformers_gives(stem: str) -> None:
    written = (tables.FOLDER / f"{stem}.json").read_text(encoding="utf-8")
    assert written == tables.text(tables.TABLES[stem])


def test_no_table_lies_beside_the_known_ones() -> None:
    assert {file.stem for file in tables.FOLDER.glob("*.json")} == set(tables.TABLES)


@pytest.mark.slow
def test_page_of_architectures_is_up_to_date() -> None:
    assert audit.PAGE.read_text(encoding="utf-8") == audit.page()


def test_second_registration_changes_nothing() -> None:
    architectures.register_tables()
    before = (list(JSON_ARCHITECTURES), {name: list(found) for name, found in NAME_TO_ARCH.items()})
    architectures.register_tables()
    assert (list(JSON_ARCHITECTURES), dict(NAME_TO_ARCH)) == before


def test_table_of_another_type_of_model_stays() -> None:
    architectures.register_tables()
    kinds = [table.expected_model_type for table in NAME_TO_ARCH["PhiForCausalLM"]]
    assert sorted(kinds) == ["phi", "phi-msft"]


def test_every_table_of_the_host_is_audited() -> None:
    known = {label.split(":")[0] for label in AUDITED}
    served = {name for name in NAME_TO_ARCH if hasattr(transformers, name)}
    assert served - known == set()
