"""Fused projections: whole by default, and taken apart by the parameter ``split``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from mergekit.merge_methods import merge_state_dicts

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.merging.split import parse_split
from tests import oracle
from tests.host.merging import LAMBDA, merge, parameters, recipe
from tests.host.models import save_family


def indices(text: str, shape: tuple[int, int]) -> list[list[int]]:
    split = parse_split(text)
    assert split is not None
    return [index[split.axis].tolist() for index in split.indices(shape)]


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("rows 2", (4, 9), [[0, 1], [2, 3]]),
        ("columns 3", (9, 6), [[0, 1], [2, 3], [4, 5]]),
        ("rows 3,1,1", (5, 9), [[0, 1, 2], [3], [4]]),
        ("rows 2 in 2", (8, 9), [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("rows 2,1 in 2", (6, 9), [[0, 1, 3, 4], [2, 5]]),
    ],
)
def test_split_finds_the_maps(text: str, shape: tuple[int, int], expected: list[list[int]]) -> None:
    assert indices(text, shape) == expected


@pytest.mark.parametrize("text", ["rows", "3", "rows 0", "lines 2", "rows 2 in 0", "rows 1.5"])
def test_malformed_split_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="must be `none`, or `rows` or `columns`"):
        parse_split(text)


@pytest.mark.parametrize("text", ["rows 3", "rows 5,4", "rows 2 in 3"])
def test_split_that_does_not_fit_names_the_shape(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not make up axis 0 of shape \(8, 2\)"):
        indices(text, (8, 2))


@pytest.mark.parametrize("text", [None, "none"])
def test_no_split_is_none(text: str | None) -> None:
    assert parse_split(text) is None


def test_misfit_in_a_merge_names_the_weight() -> None:
    states = [{"qkv.weight": torch.randn(8, 4)} for _ in range(3)]
    with pytest.raises(STFError, match=r"qkv\.weight: `split: rows 3` does not make up"):
        merge_state_dicts(states, "stf", base=0, parameters={"split": "rows 3"})


def test_attention_of_gpt2_is_split_where_the_filter_says_so(tmp_path: Path) -> None:
    checkpoints = save_family("gpt2", tmp_path)
    config = recipe(checkpoints)
    config["parameters"] |= {"split": [{"filter": "c_attn", "value": "columns 3"}]}
    merge(config, tmp_path / "out")
    folders = (checkpoints.base, *checkpoints.tuned, tmp_path / "out")
    states = [parameters(folder, transformers.GPT2LMHeadModel) for folder in folders]
    for name, whole in (("c_attn", False), ("c_fc", True)):
        kind = "attn" if name == "c_attn" else "mlp"
        base, *tuned, merged = (s[f"transformer.h.0.{kind}.{name}.weight"] for s in states)
        parts = [slice(None)] if whole else [slice(16 * i, 16 * i + 16) for i in range(3)]
        for part in parts:
            arrays = [t[:, part].double().numpy() for t in (base, *tuned)]
            expected = oracle.merge_weight(
                arrays[0], arrays[1:], "superpose", [1.0] * 3, [1.0] * 3, LAMBDA
            )
            torch.testing.assert_close(
                merged[:, part].double(), torch.from_numpy(expected), rtol=0, atol=1e-6
            )
