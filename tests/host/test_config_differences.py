"""Models of equal shapes whose settings differ: a warning names the setting, values and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mergekit.config import MergeConfiguration

from mergekit_stf.host.planning.config_differences import config_differences
from tests.cli.merges import run, write_recipe
from tests.host.merging import recipe
from tests.host.models import Checkpoints, llama, save_family, save_model

ADVICE = "; the merged model gets {}, and what was tuned for another value may not work with it"


def change(folder: Path, **values: Any) -> None:
    """Change settings of a checkpoint, those of nested configurations too."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = settings[key] | value if nested else value
    path.write_text(json.dumps(settings))


def differences(models: Checkpoints) -> list[str]:
    return [*config_differences(MergeConfiguration.model_validate(recipe(models)), False)]


@pytest.mark.parametrize(
    ("family", "values", "lines"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_theta": 500000.0}},
            [("rope_parameters", "{'rope_theta': 10000.0}", "{'rope_theta': 500000.0}")],
        ),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4},
         [("num_attention_heads", "2", "4"), ("num_key_value_heads", "2", "4"),
          ("head_dim", "8", "4")]),
        ("llama", {"rms_norm_eps": 1e-5}, [("rms_norm_eps", "1e-06", "1e-05")]),
        ("llama", {"tie_word_embeddings": True}, [("tie_word_embeddings", "False", "True")]),
        ("qwen3", {"max_position_embeddings": 64}, [("max_position_embeddings", "32", "64")]),
        ("gpt2", {"activation_function": "relu"},
         [("activation_function", "'gelu_new'", "'relu'")]),
        ("gpt2", {"n_head": 4}, [("num_attention_heads", "2", "4")]),
        ("bert", {"layer_norm_eps": 1e-6}, [("layer_norm_eps", "1e-12", "1e-06")]),
        ("t5", {"feed_forward_proj": "gelu", "dense_act_fn": "gelu"},
         [("dense_act_fn", "'relu'", "'gelu'")]),
        ("mixtral", {"num_experts_per_tok": 1}, [("num_experts_per_tok", "2", "1")]),
        ("clip", {"text_config": {"hidden_act": "gelu"}},
         [("text_config.hidden_act", "'quick_gelu'", "'gelu'")]),
    ],
)  # fmt: skip
def test_both_values_and_models_are_named(
    family: str, values: dict[str, Any], lines: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    models = save_family(family, tmp_path, tasks=3)
    for folder in models.tuned[1:]:
        change(folder, **values)
    which = f"{models.tuned[1]}, {models.tuned[2]}"
    assert differences(models) == [
        f"{name} is {here} in {models.base} and {there} in {which}{ADVICE.format(here)}"
        for name, here, there in lines
    ]


def test_old_spellings_and_what_does_not_matter_are_no_difference(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path, tasks=2)
    change(models.tuned[0], _name_or_path="elsewhere", use_cache=False, eos_token_id=3)
    path = models.tuned[1] / "config.json"
    settings = json.loads(path.read_text())
    del settings["rope_parameters"]
    path.write_text(json.dumps(settings | {"rope_theta": 10000.0, "torch_dtype": "float16"}))
    assert differences(models) == []
    path.write_text(json.dumps(settings | {"rope_theta": 20000.0, "rope_scaling": None}))
    (line,) = differences(models)
    assert "{'rope_theta': 10000.0}" in line
    assert "{'rope_theta': 20000.0}" in line


def test_every_command_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = save_model(llama(), tmp_path / "models", tasks=2)
    change(models.tuned[0], rms_norm_eps=1e-3)
    config = write_recipe(tmp_path / "r.yml", models)
    text = f"rms_norm_eps is 1e-06 in {models.base} and 0.001 in {models.tuned[0]}"
    assert text in run("plan", config).output.replace("\n", " ")
    for command, options in (("merge", ()), ("sweep", ("--lambda", "0.5"))):
        caplog.clear()
        assert run(command, config, tmp_path / command, *options).exit_code == 0
        assert any(text in record.message for record in caplog.records)
