"""The commented recipe that ``mergekit-stf init`` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import yaml

from mergekit_stf.core import methods
from mergekit_stf.core.methods import Method, Option
from mergekit_stf.host.plugin.parameters import options_of
from mergekit_stf.text import printable

OF_SINGLE_WEIGHTS = ("rule", "split")
"""Options that a recipe sets with a filter, for the weights that need them."""

COMMENT = 32
"""The column at which comments stand."""


def draft(method: Method, base: str, models: Sequence[str]) -> str:
    """Return a recipe of these models with every option at its default.

    Args:
        method: the merge method.
        base: as ``base_model`` names it.
        models: as ``model`` names each of them.
    """
    return "\n".join(_lines(method, base, models)) + "\n"


def commented(lines: Iterable[str]) -> str:
    """Return lines as comments of a recipe."""
    return "".join(f"# {printable(line)}".rstrip() + "\n" for line in lines)


def _lines(method: Method, base: str, models: Sequence[str]) -> Iterator[str]:
    others = ", ".join(name for name in methods.names() if name != method.name)
    options = [option for option in options_of(method) if option.name not in OF_SINGLE_WEIGHTS]
    yield _beside(f"merge_method: {method.name}", f"{method.title}; others: {others}")
    yield _beside(f"base_model: {_scalar(base)}", "the model that the others were tuned from")
    yield "models:"
    for model in models:
        yield f"  - model: {_scalar(model)}"
        yield "    parameters:"
        yield from (_option(option, "      ") for option in options if option.per_model)
    yield "parameters:"
    yield from (_option(option, "  ") for option in options if not option.per_model)


def _option(option: Option, indent: str) -> str:
    return _beside(f"{indent}{option.name}: {_scalar(option.default)}", option.help)


def _scalar(value: object) -> str:
    """Return a value as YAML writes it on one line."""
    return yaml.safe_dump(value, width=float("inf"), allow_unicode=True).split("\n")[0]


def _beside(text: str, comment: str) -> str:
    return f"{text:<{COMMENT - 2}}  # {comment}"
