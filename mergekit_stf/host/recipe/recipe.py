"""Every check of a recipe that needs no weights, all problems reported together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import read_text
from mergekit_stf.host.recipe.keys import did_you_mean, unknown_keys
from mergekit_stf.host.recipe.models import model_problems
from mergekit_stf.host.recipe.parameters import parameter_problems, parameter_warnings
from mergekit_stf.host.recipe.yaml_text import Document, Problem, parse_yaml, short_repr

REPORTED = 100
"""Problems of a recipe that are listed."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that passed every check.

    Attributes:
        config: the host's configuration object.
        text: the recipe as it was written.
        source: where it came from, for messages.
        warnings: what is legal but probably not meant, one line each.
        path: the file that it was read from, None for a text.
    """

    config: MergeConfiguration
    text: str
    source: str = "recipe"
    warnings: tuple[str, ...] = ()
    path: Path | None = None


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        STFError: the file cannot be read, or `check_recipe` finds a problem in it.
    """
    return replace(check_recipe(read_text(Path(path)), source=str(path)), path=Path(path))


def check_recipe(text: str, source: str = "recipe") -> Recipe:
    """Check a recipe's syntax, keys at every level, method, parameters and models.

    Args:
        text: the YAML text.
        source: the name used for it in messages.

    Raises:
        STFError: one line for each problem, with line number and key path.
    """
    document = parse_yaml(text, source)
    problems = [*document.repeated, *_problems(document.data)]
    config = None
    if not problems:
        config, problems = _validated(document.data)
    if config is None or problems:
        raise STFError(*_report(document, problems, source))
    warnings = tuple(document.locate(p) for p in parameter_warnings(document.data))
    return Recipe(config, text, source, warnings)


def _report(document: Document, problems: list[Problem], source: str) -> list[str]:
    lines = list(dict.fromkeys(document.locate(problem) for problem in problems))
    if len(lines) == 1:
        return [f"{source}: {lines[0]}"]
    more = ["..."] if len(lines) > REPORTED else []
    listed = (f"  {line}" for line in (*lines[:REPORTED], *more))
    return [f"{source}: {len(lines)} problems", *listed]


def _problems(data: Any) -> Iterator[Problem]:
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        yield Problem("", f"a recipe is a mapping with merge_method and models; got {kind}")
        return
    yield from unknown_keys(data, MergeConfiguration)
    yield from _method_problems(data)
    yield from _sections(data)
    yield from model_problems(data)
    yield from parameter_problems(data)
    yield from _dtypes(data)


def _method_problems(data: dict[Any, Any]) -> Iterator[Problem]:
    name = data.get("merge_method")
    known = sorted(method.spec.name for method in merge_methods.registered_methods())
    if name is None:
        yield Problem("merge_method", "missing; for example «merge_method: stf»")
    elif name not in known:
        yield Problem(
            "merge_method", f"unknown method {short_repr(name)}{did_you_mean(name, known)}"
        )


def _sections(data: dict[Any, Any]) -> Iterator[Problem]:
    given = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(given) != 1:
        what = " and ".join(given) or "none of them"
        yield Problem("", f"give exactly one of models, slices and modules; got {what}")
    if data.get("tokenizer_source") and data.get("tokenizer"):
        yield Problem("tokenizer_source", "give tokenizer_source or tokenizer, not both")


def _dtypes(data: dict[Any, Any]) -> Iterator[Problem]:
    names = ["float16", "bfloat16", "float32", "float64"]
    for key in ("dtype", "out_dtype"):
        value = data.get(key)
        if value is not None and str(value).removeprefix("torch.") not in names:
            expected = ", ".join(names)
            yield Problem(key, f"expected one of {expected}; got {short_repr(value)}")


def _validated(data: Any) -> tuple[MergeConfiguration | None, list[Problem]]:
    try:
        return MergeConfiguration.model_validate(data), []
    except ValidationError as error:
        return None, [_from_pydantic(item) for item in error.errors()]
    except (RuntimeError, RecursionError) as error:
        return None, [Problem("", str(error))]


def _from_pydantic(item: Any) -> Problem:
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return Problem(path.lstrip("."), f"{item['msg']}; got {short_repr(item.get('input'))}")
