"""The parameters of our merge methods as the host sees them.

Names are mergekit's own where it has one, so that a ``ties`` or ``task_arithmetic`` recipe runs
with one word changed. The STF paper's γ is ``lambda``, its η is ``density``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_stf.core import STFError
from mergekit_stf.core.methods import Method, Option
from mergekit_stf.core.methods.options import fraction, number, one_of
from mergekit_stf.host.merging.split import parse_split

RULES = ("auto", "merge", "superpose", "sum", "mean", "base")
"""What ``rule`` may say; ``superpose`` is what ``stf`` calls its own rule, ``merge``."""

IGNORED = ("normalize", "rescale", "int8_mask")
"""What a TIES recipe carries and our methods have no use for."""


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


def rule(value: object) -> str:
    """Return the name of a rule."""
    return one_of(value, RULES)


def options_of(method: Method) -> tuple[Option, ...]:
    """Return every option that a recipe of this method may set."""
    return (
        Option("weight", 1.0, number, "scales that model's difference from the base", True),
        Option(
            "density",
            method.default_density,
            fraction,
            "fraction of it kept, the largest entries",
            True,
        ),
        Option("lambda", method.default_lambda, number, "scale of the merged difference"),
        *method.options,
        Option("rule", "auto", rule, "how a weight is merged"),
        Option("split", "none", parse_split, "maps of a fused matrix"),
    )


def parameters_of(method: Method) -> tuple[ParameterSpec, ...]:
    """Return a method's options as parameters of the host."""
    return (
        *(
            Parameter(
                option.name,
                Any,
                ParameterScope.NON_BASE if option.per_model else ParameterScope.SHARED,
                option.default,
                option.help,
                check=option.parse,
            )
            for option in options_of(method)
        ),
        *(
            ParameterSpec(name, Any, ParameterScope.SHARED, None, "accepted and ignored, aloud")
            for name in IGNORED
        ),
    )
