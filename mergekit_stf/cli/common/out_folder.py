"""The argument OUT of the commands that write a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class OutFolder(click.Path):
    """A folder to write; an empty text is an error, where a path would be the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Return the path of a text that is not empty."""
        if not str(value).strip():
            self.fail("it is empty; a variable of the shell may not be set", parameter, context)
        return super().convert(value, parameter, context)
