"""The parameters of ``merge_method: stf``, their ranges and their defaults.

Names are mergekit's own where it has one, so that a ``ties`` or ``task_arithmetic`` recipe runs
with one word changed. The paper's γ is ``lambda``, its η is ``density``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.merging.split import parse

RULES = ("auto", "superpose", "sum", "mean", "base")
DEFAULT_LAMBDA = 0.8
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Parameter(ParameterSpec):
    """A parameter whose ``validate`` says its name when it refuses a value."""

    check: Callable[[Any], Any] = lambda value: value

    def validate(self, value: Any) -> Any:
        """Return the value as the method uses it.

        Raises:
            STFError: with the parameter's name, the value, and what is allowed.
        """
        try:
            return self.check(value)
        except (ValueError, TypeError) as error:
            raise STFError(f"parameter `{self.name}`: {error}, got {value!r}") from error


def number(value: Any) -> float:
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


def decimal_comma(value: Any) -> str:
    """Say how a number with a comma in it is written; nothing where there is none."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value):
        return f"must be written with a point, {value.strip().replace(',', '.')}"
    return ""


def density(value: Any) -> float:
    """Return the fraction of entries that trimming keeps."""
    if not 0 < (converted := number(value)) <= 1:
        raise ValueError("must be above 0 and at most 1")
    return converted


def rank(value: Any) -> float:
    """Return the fraction, up to 1, or the count, above 1, of features that are kept."""
    if not (converted := number(value)) > 0:
        raise ValueError("must be a fraction in (0, 1] or a count above 1")
    return converted


def ridge(value: Any) -> float | str:
    """Return ``auto`` or what is added to the unit diagonal of G."""
    if value == "auto":
        return "auto"
    message = "must be `auto` or a number, 0 or above"
    try:
        converted = number(value)
    except ValueError:
        raise ValueError(message) from None
    if converted < 0:
        raise ValueError(message)
    return converted


def rule(value: Any) -> str:
    """Return the name of a rule."""
    if value not in RULES:
        raise ValueError(f"must be one of {', '.join(RULES)}")
    return str(value)


PARAMETERS: tuple[ParameterSpec, ...] = (
    Parameter("weight", float, ParameterScope.NON_BASE, 1.0, "scales a task matrix", check=number),
    Parameter("density", float, ParameterScope.NON_BASE, 1.0, "fraction kept", check=density),
    Parameter("lambda", float, ParameterScope.SHARED, DEFAULT_LAMBDA, "scale of M", check=number),
    Parameter("rank", float, ParameterScope.SHARED, 1.0, "leading features kept", check=rank),
    Parameter("ridge", Any, ParameterScope.SHARED, "auto", "regularisation of G", check=ridge),
    Parameter("rule", str, ParameterScope.SHARED, "auto", "how a weight is merged", check=rule),
    Parameter("split", Any, ParameterScope.SHARED, "none", "maps of a fused matrix", check=parse),
    ParameterSpec("normalize", Any, ParameterScope.SHARED, None, "accepted and ignored, aloud"),
    ParameterSpec("rescale", Any, ParameterScope.SHARED, None, "accepted and ignored, aloud"),
    ParameterSpec("int8_mask", Any, ParameterScope.SHARED, None, "accepted and ignored, aloud"),
)

IGNORED = ("normalize", "rescale", "int8_mask")
"""What a TIES recipe carries and STF has no use for."""
