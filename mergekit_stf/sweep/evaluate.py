"""A user's command that scores a merged model."""

from __future__ import annotations

import math
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mergekit_stf.core.errors import STFError

PLACE = "{out}"


@dataclass(frozen=True)
class Evaluation:
    """How to score a model.

    Attributes:
        command: with ``{out}`` in place of the model's folder; it is split as a shell would and
            run without one.
        lower_is_better: whether the number is a loss.
    """

    command: str
    lower_is_better: bool

    def __post_init__(self) -> None:
        """Refuse a command without a place for the folder, or one that cannot be split."""
        if PLACE not in self.command:
            raise STFError(f"--eval {self.command!r} does not say {PLACE}, the folder to score")
        try:
            shlex.split(self.command)
        except ValueError as error:
            raise STFError(f"--eval {self.command!r} cannot be split: {error}") from error


def evaluate(evaluation: Evaluation, folder: Path) -> float:
    """Run the command on a folder and return the number that ends its last line.

    Raises:
        STFError: the command cannot be run, fails, or prints no number last.
    """
    parts = [part.replace(PLACE, str(folder)) for part in shlex.split(evaluation.command)]
    shown = shlex.join(parts)
    try:
        done = subprocess.run(parts, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise STFError(f"--eval: cannot run {shown}: {error.strerror}") from error
    if done.returncode:
        raise STFError(f"--eval: {shown} ended with exit code {done.returncode}")
    return _number(done.stdout, shown)


def _number(output: str, shown: str) -> float:
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    try:
        number = float(last.split()[-1]) if last else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise STFError(f"--eval: the last line of {shown} ends with no number: {last[:80]!r}")
    return number
