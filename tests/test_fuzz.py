"""Recipes with every kind of nonsense in them: each ends in a merge or in a message."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from mergekit_stf.cli.common.errors import FAULT
from mergekit_stf.cli.main import main
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.recipe.recipe import check_recipe
from tests.host.models import Checkpoints, build, save_model

WORDS = st.sampled_from(
    [
        "stf",
        "ties",
        "linear",
        "passthrough",
        "models",
        "slices",
        "modules",
        "sources",
        "model",
        "parameters",
        "weight",
        "density",
        "lambda",
        "lamda",
        "rank",
        "ridge",
        "rule",
        "auto",
        "superpose",
        "mean",
        "base",
        "value",
        "filter",
        "layer_range",
        "dtype",
        "float16",
        "tokenizer",
        "tokenizer_source",
        "union",
        "base_model",
        "~/x",
        "../x",
        "a/b",
        "a+b",
        "x@y@z",
        "nan",
        "1e-3",
        "*",
        "mlp",
        "out_dtype",
        "chat_template",
        "residual_weight",
        "kind",
        "zero",
    ]
)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers()
    | st.floats()
    | WORDS
    | st.text(max_size=8)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


PLAUSIBLE = {
    "merge_method": ["ties", "linear", "passthrough", "slerp", "model_stock", "task_arithmetic"],
    "dtype": ["float16", "bfloat16", "float64", "torch.float32"],
    "out_dtype": ["float16", "float64", "bfloat16"],
    "tokenizer_source": ["base", "union", "somewhere"],
    "tokenizer": [{"source": "base"}, {"source": "union", "pad_to_multiple_of": 0}],
    "chat_template": ["auto", "chatml", "{{ messages }}", "none"],
    "parameters": [
        {"lambda": 1e300},
        {"lambda": [-1, 1e-320], "rank": 1e18},
        {"rank": 1e-9, "ridge": 1e300},
        {"rank": [1, 5]},
        {"density": 1e-9, "weight": -1e30},
        {"rule": "superpose"},
        {"rule": "mean", "normalize": True, "weight": 0},
        {"rule": ["sum", "base"], "ridge": {"filter": "*", "value": [0, 1]}},
        {"t": 0.5},
    ],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    return save_model(build("LlamaForCausalLM", config), tmp_path_factory.mktemp("models"), 2)


def good(models: Checkpoints, sliced: bool) -> dict[str, Any]:
    """Return a recipe that works and has something at every level."""
    sources = [
        {"model": str(model), "parameters": {"weight": 1.0, "density": [0.5, 1.0]}}
        for model in models.tuned
    ]
    recipe: dict[str, Any] = {
        "merge_method": "stf",
        "base_model": str(models.base),
        "parameters": {"lambda": 0.7, "rule": [{"filter": "mlp", "value": "sum"}]},
        "dtype": "float32",
    }
    if not sliced:
        return recipe | {"models": sources}
    sources = [{"model": str(models.base)}, *sources]
    ranged = [source | {"layer_range": [0, 1]} for source in sources]
    return recipe | {"slices": [{"sources": ranged, "parameters": {"rank": 0.9}}]}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container in a recipe with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def mutate(recipe: Any, draw: st.DataObject) -> None:
    if isinstance(recipe, dict) and draw.draw(st.booleans()):
        name = draw.draw(st.sampled_from(sorted(PLAUSIBLE)))
        recipe[name] = copy.deepcopy(draw.draw(st.sampled_from(PLAUSIBLE[name])))
        return
    container, key = draw.draw(st.sampled_from(places(recipe)))
    kind = draw.draw(st.sampled_from(["replace", "remove", "rename", "add", "repeat"]))
    if kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[draw.draw(WORDS)] = container.pop(key)
    elif kind == "add" and isinstance(container, dict):
        container[draw.draw(WORDS | st.integers(0, 2) | st.none())] = draw.draw(JUNK)
    elif kind == "repeat" and isinstance(container, list):
        container.append(copy.deepcopy(container[key]))
    else:
        container[key] = draw.draw(JUNK)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), sliced=st.booleans(), changes=st.integers(1, 3))
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_recipe_ends_in_a_traceback(
    models: Checkpoints, tmp_path: Path, data: st.DataObject, sliced: bool, changes: int
) -> None:
    recipe = good(models, sliced)
    for _ in range(changes):
        if places(recipe):
            mutate(recipe, data)
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    result = CliRunner().invoke(main, ["merge", str(path), str(out), "--force", "--quiet"])
    assert result.exit_code in (0, 1, 4), (result.output, result.exception)
    assert result.exit_code != FAULT
    assert "Traceback" not in result.output
    assert (result.exit_code == 0) or "Error: " in result.output


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.text(max_size=60)
    | st.text(alphabet="{}[]&*!|>-:,#'\"\n ?@%ab0.", max_size=60)
    | st.binary(max_size=60).map(lambda data: data.decode("latin-1"))
)
def test_no_text_ends_in_anything_but_our_error(text: str) -> None:
    with pytest.raises(STFError):
        check_recipe(text)
