"""Six kinds of text that every Python installation carries.

Three kinds are written down as they are found (source files, the help topics of ``pydoc_data``, the
names of Unicode characters); the other three are computed from the same source files (byte code,
JSON records, HTML entries). Nothing is downloaded. A kind is a sequence of documents: where a
document comes from, and a function that returns its blocks.
"""

from __future__ import annotations

import ast
import dis
import html
import importlib
import json
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import CodeType

from mergekit_stf.core.errors import STFError

Documents = Iterator[tuple[str, Callable[[], list[str]]]]


def library() -> Path:
    """Return the directory of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


@cache
def _sources() -> dict[str, str]:
    """Return the text of every top-level module of the standard library by file name."""
    files = [f for f in sorted(library().glob("*.py")) if not f.name.startswith("_sysconfigdata")]
    if len(files) < 50:
        raise STFError(
            f"{library()} holds {len(files)} source files of the standard library, the demo needs "
            "50: run it with a Python that carries them (python.org, Debian, conda, uv, pyenv)"
        )
    return {file.name: file.read_text(encoding="utf-8") for file in files}


@cache
def _tree(name: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(_sources()[name])


def _paragraphs(text: str) -> list[str]:
    return [block + "\n" for block in re.split(r"\n\s*\n", text)]


def _python() -> Documents:
    for name, source in _sources().items():
        yield name, partial(_paragraphs, source)


def _prose() -> Documents:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise STFError(
            "this Python lacks pydoc_data.topics, the English text of the demo: run it with a full "
            "CPython 3.10 to 3.13"
        ) from error
    for name, text in topics.items():
        paragraphs = _paragraphs(text)
        for start in range(0, len(paragraphs), 20):
            yield f"{name} {start}", partial(list, paragraphs[start : start + 20])


def _unicode() -> Documents:
    for start in range(0x80, 0x20000, 32):
        yield f"U+{start:05X}", partial(_characters, start)


def _characters(start: int) -> list[str]:
    counted = re.compile(r"IDEOGRAPH|HANGUL SYLLABLE|-[0-9A-F]{3,}$|VARIATION SELECTOR")
    return [
        f"{point:05X}  {unicodedata.category(chr(point))}  {chr(point)}  {name}"
        for point in range(start, start + 32)
        if (name := unicodedata.name(chr(point), "")) and not counted.search(name)
    ]


def _bytecode() -> Documents:
    for name in _sources():
        yield name, partial(_listings, name)


def _listings(name: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = compile(_sources()[name], name, "exec")
    return [_listing(part) for part in _code_objects(code)]


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _code_objects(constant)


def _listing(code: CodeType) -> str:
    lines = [
        f"{step.offset:>6}  {step.opname:<20} {_operand(step)}".rstrip()
        for step in dis.get_instructions(code)
    ]
    return "\n".join([f"{code.co_name}:", *lines, ""])


def _operand(step: dis.Instruction) -> str:
    """Return what ``dis`` shows, without what differs from run to run: addresses, set order."""
    if isinstance(step.argval, frozenset):
        return repr(sorted(step.argval, key=repr))[:60]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", step.argrepr)[:60]


def _functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(_tree(name)) if isinstance(node, ast.FunctionDef)]


def _json() -> Documents:
    for name in _sources():
        yield name, partial(_records, name)


def _records(name: str) -> list[str]:
    return [
        json.dumps(
            {
                "file": name,
                "line": node.lineno,
                "name": node.name,
                "arguments": [argument.arg for argument in node.args.args],
                "names": sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)})[:8],
                "statements": len(node.body),
            }
        )
        for node in _functions(name)
    ]


def _html() -> Documents:
    for name in _sources():
        yield name, partial(_entries, name)


def _entries(name: str) -> list[str]:
    return [_entry(node) for node in _functions(name)]


def _entry(node: ast.FunctionDef) -> str:
    arguments = ", ".join(f"<i>{argument.arg}</i>" for argument in node.args.args)
    summary = html.escape((ast.get_docstring(node) or "").partition("\n\n")[0])
    return (
        f'<dt id="{node.name}"><b>{node.name}</b>({arguments})</dt>\n'
        f'<dd class="line-{node.lineno}"><p>{summary}</p></dd>'
    )


KINDS: dict[str, Callable[[], Documents]] = {
    "python": _python,
    "prose": _prose,
    "unicode": _unicode,
    "bytecode": _bytecode,
    "json": _json,
    "html": _html,
}
