"""Recipe text to plain data, with the line of every key."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from mergekit_stf.core.errors import STFError
from mergekit_stf.text import printable

MAX_NODES = 100_000
ONE_DOCUMENT = "expected a single document in the stream"
"""What PyYAML says of a file with several documents."""

MAX_CHARACTERS = 1_000_000
MAX_PATHS = 20 * MAX_CHARACTERS
"""Characters of all key paths together: each value has one, and a key may be long."""

MAX_DIGITS = 400
"""Characters of a number; the largest one of float64 has 309 digits."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the key path that it is about, and what to do."""

    path: str
    message: str


@dataclass(frozen=True)
class Document:
    """A parsed recipe: plain data, the first line of each key path, and repeated keys."""

    data: Any
    lines: dict[str, int] = field(default_factory=dict)
    repeated: tuple[Problem, ...] = ()

    def locate(self, problem: Problem) -> str:
        """Write a problem as ``line 7, models[0].parameters.weight: ...``, on one line."""
        path = problem.path
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        where = [f"line {self.lines[path]}"] if path in self.lines else []
        where += [problem.path] if problem.path else []
        return printable(f"{', '.join(where)}: {problem.message}" if where else problem.message)


def first_line(error: object) -> str:
    """Return the first line of an error's message; libraries write essays."""
    return str(error).partition("\n")[0]


def short_repr(value: object) -> str:
    """Return ``repr`` of a recipe's value, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def join_path(path: str, key: object) -> str:
    """Append a mapping's key, or a sequence's integer index in brackets, to a key path."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for numbers that a computer can hold."""

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Return a number.

        Raises:
            yaml.MarkedYAMLError: float64 cannot hold it, or it is written with too many digits.
        """
        if len(node.value) <= MAX_DIGITS:
            whole = node.tag == "tag:yaml.org,2002:int"
            number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
            if not whole or abs(number) <= sys.float_info.max:
                return number
        raise yaml.constructor.ConstructorError(
            None, None, "a number beyond what float64 can hold", node.start_mark
        )


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def parse_yaml(text: str, source: str) -> Document:
    """Parse YAML safely: no tags beyond the standard ones, no aliases that explode.

    Raises:
        STFError: the text is no YAML; the message names the line and the column.
    """
    if len(text) > MAX_CHARACTERS:
        raise STFError(f"{source}: longer than {MAX_CHARACTERS} characters; no recipe is that long")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(data=None)
        document = _document(node)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise STFError(_marked(error, source)) from error
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, STFError):
            raise STFError(f"{source}: {error}") from None
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise STFError(f"{source}: not readable as YAML: {printable(reason)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(data, document.lines, document.repeated)


def _document(root: yaml.Node) -> Document:
    lines: dict[str, int] = {}
    repeated: list[Problem] = []
    length = 0
    for count, (path, line) in enumerate(_walk(root, "", ()), start=1):
        length += len(path)
        if count > MAX_NODES:
            raise STFError(
                f"more than {MAX_NODES} values (aliases included); no recipe is that long"
            )
        if length > MAX_PATHS:
            raise STFError("many values stand under long keys; no recipe has keys that long")
        if path in lines:
            repeated.append(Problem(path, f"given again on line {line}; keep one of them"))
        lines.setdefault(path, line)
    return Document(None, lines, tuple(repeated))


def _walk(node: yaml.Node, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    if id(node) in above:
        raise STFError(f"the alias on line {node.start_mark.line + 1} contains itself")
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = join_path(path, str(key.value))
            yield name, key.start_mark.line + 1
            yield from _walk(value, name, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = join_path(path, index)
            yield name, value.start_mark.line + 1
            yield from _walk(value, name, above)


def _marked(error: yaml.MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    if error.context == ONE_DOCUMENT:
        return (
            f"{source}{where}: a second recipe starts here; give one recipe a file, or merge them "
            "in turn with mergekit-multi, which reads several from one file"
        )
    what = " ".join(part for part in (error.context, error.problem) if part)
    return f"{source}{where}: not readable as YAML: {printable(first_line(what))}"
