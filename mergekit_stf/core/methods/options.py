"""The options of merge methods: plain data, of which the host's parameters and docs are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Option:
    """One option of a recipe.

    Attributes:
        name: its key under ``parameters``.
        default: its value where the recipe gives none.
        parse: turns what the recipe says into the value that the method uses, and raises
            ``ValueError`` with what is allowed.
        help: a phrase on what it does, for tables and help texts.
        per_model: each model of the recipe may have its own.
    """

    name: str
    default: Any
    parse: Callable[[object], Any]
    help: str
    per_model: bool = False


def number(value: object) -> float:
    """Return a finite number; YAML reads ``1e-3`` as a text, which counts as its number."""
    message = "must be a finite number that float32 can hold"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(message)
    try:
        converted = float(value)
    except (ValueError, OverflowError):
        raise ValueError(decimal_comma(value) or message) from None
    if not abs(converted) <= LARGEST:
        raise ValueError(message)
    return converted


def fraction(value: object) -> float:
    """Return a share of what is kept."""
    if not 0 < (converted := number(value)) <= 1:
        raise ValueError("must be above 0 and at most 1")
    return converted


def not_negative(value: object) -> float:
    """Return a number, 0 or above."""
    if (converted := number(value)) < 0:
        raise ValueError("must be a number, 0 or above")
    return converted


def one_of(value: object, names: Sequence[str]) -> str:
    """Return the value, if it is one of these names."""
    if value not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return str(value)


def decimal_comma(value: object) -> str:
    """Say how a number with a comma in it is written; nothing where there is none."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value):
        return f"must be written with a point, {value.strip().replace(',', '.')}"
    return ""


def rank(value: object) -> float:
    """Return the fraction, up to 1, or the count, above 1, of features that are kept."""
    if not (converted := number(value)) > 0:
        raise ValueError("must be a fraction in (0, 1] or a count above 1")
    return converted


def ridge_or_auto(value: object) -> float | str:
    """Return ``auto`` or a number that is not negative."""
    if value == "auto":
        return "auto"
    try:
        return not_negative(value)
    except ValueError:
        raise ValueError("must be `auto` or a number, 0 or above") from None


def calibration(value: object) -> float:
    """Return the bound of singular value calibration, 1 for ``true``; 0, or ``false``, is none."""
    converted = float(value) if isinstance(value, bool) else number(value)
    if converted < 0:
        raise ValueError("must be true, false, or a number above 0")
    return converted


RANK = Option("rank", 1.0, rank, "leading features kept: a fraction up to 1, or a count above 1")
CALIBRATE = Option("calibrate", 0, calibration, "singular values that tasks inflate are reduced")
