"""The one way to the terminal: what comes from a file cannot move its cursor or forge a line.

Names in locks, checkpoints, folders and adapters may hold control characters, which a terminal
obeys. Our own lines go through `echo`, which escapes these and line breaks too. What others print
(the host's log, warnings, progress bars, click) goes through the streams that `escape_streams` puts
in the place of the standard ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from mergekit_stf.text import printable

if TYPE_CHECKING:
    from pydantic import BaseModel

MOVES = re.compile(r"[\r\n]|(\x1b\[A)+")
"""What a progress bar writes besides its text."""


def echo(line: str, err: bool = False, nl: bool = True) -> None:
    """Print one line, whatever is in it.

    Args:
        line: its text; control characters and line breaks in it are escaped.
        err: print to the standard error stream.
        nl: end the line; else the next one goes on in it.
    """
    click.echo(printable(line), err=err, nl=nl)


def echo_json(model: BaseModel) -> None:
    """Print a model as one JSON object in ASCII, with null for what is no number."""
    text = json.dumps(model.model_dump(mode="json"))
    click.echo(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2))


@contextmanager
def escape_streams() -> Iterator[None]:
    """Escape what is written to the standard streams inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", EscapingStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class EscapingStream:
    """A text stream that escapes control characters, and what its encoding does not have.

    Line breaks and tabs stay, and so does what draws a progress bar: a carriage return before a
    text, and moves of the cursor that are written alone.

    Args:
        stream: where the text goes; all else that is asked of this one is its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"

    @property
    def encoding(self) -> str:
        """UTF-8, as any text may be written here; click would open an ASCII stream anew."""
        return "utf-8"

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        if not MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            text = start + printable(text.removeprefix("\r"), keep="\n\t")
        self._stream.write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream itself."""
        return getattr(self._stream, name)
