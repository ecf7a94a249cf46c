"""Imports point down, no module remembers, and each package imports only what it may."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments import PACKAGE

LAYERS = {"core": 0, "host": 1, "demo": 2, "report": 2, "sweep": 2, "cli": 3}
"""Each may import what lies lower, and itself; ``sweep`` draws with ``report`` besides."""
BESIDE = {("sweep", "report")}
OURS = "mergekit_stf"
MOST_MODULES = 12
MOST_CORE_LINES = 1900

MUTABLE = frozenset({
    "list", "dict", "set", "bytearray", "Counter", "defaultdict", "deque", "OrderedDict",
    "Lock", "RLock", "Condition", "Event", "Semaphore", "local", "ContextVar",
    "WeakKeyDictionary", "WeakValueDictionary", "cache", "lru_cache",
})  # fmt: skip
"""What makes an object that can change, by the last part of its name."""

READ_ONLY = ("Mapping[", "Sequence[", "Collection[", "AbstractSet[", "Final[Mapping[")
"""Annotations under which mypy refuses every change."""

STATE = {
    "core/methods/__init__.py": {"_METHODS": "the registry, filled by imports"},
    "core/pool.py": {
        "_sharing": "one thread at a time shares the cores out",
        "_large": "large decompositions on a card wait for each other",
        "_own": "the stream of each worker on a card",
        "_cores": "worker threads, kept between weights",
        "_streams": "worker threads and streams, kept between weights",
    },
    "host/adapters/patterns.py": {"_compile": "pure: a pattern by its text"},
    "host/architectures/__init__.py": {"_register_once": "our tables are put into the host's once"},
    "host/architectures/all_weights.py": {"_ours": "a merge of ours, or the host's own"},
    "host/architectures/coverage.py": {"_guarding": "whether the host's planner is guarded"},
    "host/architectures/exact.py": {"_split_cached": "pure: a table by its configuration"},
    "host/architectures/fitted.py": {"_names": "pure: names by their configuration"},
    "host/architectures/loading.py": {"_parameter_names": "pure: names by their configuration"},
    "host/checkpoints/headers.py": {"_headers": "pure: a header by file and time of its change"},
    "host/checkpoints/weight_files.py": {"_names": "pure: names by file, size, time and inode"},
    "host/diagnostics/notices.py": {"say_once": "what was said where there is no merge of ours"},
    "host/executors/worker.py": {"_begin": "the merge for which a worker has checked its machine"},
    "host/merging/finite.py": {"_fills_parameter": "pure: by name and model"},
    "host/merging/whole_models.py": {"_measured": "pure: by models, files and threads"},
    "host/plugin/autoload.py": {"_warn_once": "what was said of the registration"},
    "host/plugin/saving.py": {"check_before_saving": "the host's task of writing is wrapped once"},
    "host/store/entry.py": {
        "source_of": "pure: a digest of a module's source",
        "sources": "pure: a digest of our sources",
        "_build": "pure: digests of versions, sources and machine",
    },
}
"""All that a module of ``core`` or ``host`` may keep, and why."""

PRIVATE = {"host/compat.py", "cli/common/errors.py"}
"""Modules that touch private names of others: the host's, and ``os._exit``."""


def modules(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the path in the package and the tree of every module in these folders, or of all."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if not folders or name.parts[0] in folders:
            yield name.as_posix(), ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, at its top or inside a function."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            yield module
            if module.split(".")[0] == OURS:
                yield from (f"{module}.{name.name}" for name in node.names)


def edges() -> Iterator[tuple[Path, str]]:
    for path in PACKAGE.rglob("*.py"):
        for name in imported(path):
            yield path.relative_to(PACKAGE), name


def layer(name: str) -> str | None:
    """Return the package of ours that a module belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == OURS and len(parts) > 1 and parts[1] in LAYERS else None


def last_name(node: ast.expr) -> str:
    """Return the last part of a dotted name, called or not; nothing for what is no name."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):
        node = node.value
    return getattr(node, "attr", getattr(node, "id", ""))


def can_change(value: ast.expr | None) -> bool:
    """Say whether an expression makes an object that can change."""
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    if isinstance(value, ast.BinOp):
        return can_change(value.left) or can_change(value.right)
    return isinstance(value, displays) or (
        isinstance(value, ast.Call) and last_name(value) in MUTABLE
    )


def state(tree: ast.Module) -> Iterator[str]:
    """Yield the names in which a module keeps something that can change, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from node.names
        if isinstance(node, ast.FunctionDef) and any(
            last_name(decorator) in MUTABLE for decorator in node.decorator_list
        ):
            yield node.name
    for target, value, annotation in _assignments(tree.body):
        if can_change(value) and not annotation.startswith(READ_ONLY) and target != "__all__":
            yield target


def _assignments(
    body: list[ast.stmt], fields: bool = False
) -> Iterator[tuple[str, ast.expr | None, str]]:
    """Yield target, value and annotation of what is set when a module is imported.

    That is in conditions and classes too, but for fields, whose values pydantic copies.
    """
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value, "") for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and not fields:
            yield ast.unparse(node.target), node.value, ast.unparse(node.annotation)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.ClassDef)):
            yield from _assignments(node.body, isinstance(node, ast.ClassDef))


@pytest.mark.parametrize(
    "text",
    [
        "x = []",
        "x: dict[str, int] = {}",
        "x = {1} | y",
        "x = collections.Counter()",
        "x = ContextVar[int]('x')",
        "class A:\n    x = {}",
        "if y:\n    x = threading.Lock()",
        "@functools.lru_cache(maxsize=3)\ndef x(): ...",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_state_is_seen(text: str) -> None:
    assert list(state(ast.parse(text))) == ["x"]


@pytest.mark.parametrize("text", ["x = ()", "x: Mapping[str, int] = {}", "x = frozenset({1})"])
def test_constants_are_no_state(text: str) -> None:
    assert list(state(ast.parse(text))) == []


def test_no_module_remembers_but_for_these_reasons() -> None:
    found = {path: set(state(tree)) for path, tree in modules("core", "host")}
    assert {path: names for path, names in found.items() if names} == {
        path: set(reasons) for path, reasons in STATE.items()
    }


def test_every_file_is_seen() -> None:
    assert {path.parts[0] for path, _ in edges() if len(path.parts) > 1} == set(LAYERS)
    names = set(imported(PACKAGE / "host" / "__init__.py"))
    assert "mergekit.merge_methods" in names
    assert "mergekit_stf.host.plugin.method" in set(
        imported(PACKAGE / "host" / "plugin" / "autoload.py")
    )


def test_no_arrow_points_up() -> None:
    arrows = {(path.parts[0], layer(name)) for path, name in edges() if len(path.parts) > 1}
    between = {(a, b) for a, b in arrows if b is not None and a != b}
    assert {(a, b) for a, b in between if LAYERS[a] <= LAYERS[b]} <= BESIDE
    assert ("host", "core") in between


def test_the_core_imports_torch_and_the_standard_library() -> None:
    allowed = {"torch", OURS, *sys.stdlib_module_names}
    foreign = [
        (str(path), name)
        for path, name in edges()
        if path.parts[0] == "core" and name.split(".")[0] not in allowed
    ]
    assert foreign == []


def test_only_the_host_package_imports_mergekit() -> None:
    importers = {path.parts[0] for path, name in edges() if name.split(".")[0] == "mergekit"}
    assert importers == {"host"}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of others that a module imports, reads, sets, or asks for by text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != OURS:
            yield from (n.name for n in node.names if _is_private(n.name))
        own = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and not own:
            yield node.attr
        if isinstance(node, ast.Call) and last_name(node) in ("getattr", "setattr", "hasattr"):
            text = node.args[1]
            if isinstance(text, ast.Constant) and _is_private(str(text.value)):
                yield str(text.value)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_of_others_are_touched_in_one_module() -> None:
    found = {path for path, tree in modules() if any(private_names(tree))}
    assert found == PRIVATE
    tree = ast.parse((PACKAGE / "cli" / "common" / "errors.py").read_text("utf-8"))
    assert set(private_names(tree)) == {"_exit"}


def test_what_is_private_is_imported_by_nobody_else() -> None:
    internal = ("transformers.conversion_mapping", "transformers.core_model_loading",
                "transformers.initialization", "transformers.integrations",
                "mergekit.architecture.json_definitions._")  # fmt: skip
    importers = {path.as_posix() for path, name in edges() if name.startswith(internal)}
    assert importers == {"host/compat.py"}
    assert not [n for n in imported(PACKAGE / "host" / "compat.py") if n.split(".")[0] == OURS]


def test_the_package_itself_imports_the_hook_alone() -> None:
    """The interface is imported when something of it is asked for; a test of it looks at that."""
    found = {name for name in imported(PACKAGE / "__init__.py") if name != OURS}
    assert {name for name in found if not name.startswith(f"{OURS}.interface")} == {
        "_mergekit_stf_autoload"
    }


def test_no_folder_holds_many_modules() -> None:
    folders = [path for path in (PACKAGE, *PACKAGE.rglob("*")) if path.is_dir()]
    counts = {
        str(folder.relative_to(PACKAGE.parent)): len([*folder.glob("*.py")])
        - (folder / "__init__.py").exists()
        for folder in folders
    }
    assert {name: count for name, count in counts.items() if count > MOST_MODULES} == {}


def test_the_core_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    """Merge methods but the first come on top of it, one file each, and so does calibration."""
    shared = {"__init__.py", "method.py", "options.py", "stf.py"}
    methods = PACKAGE / "core" / "methods"
    files = [
        path
        for path in (PACKAGE / "core").rglob("*.py")
        if (path.parent != methods or path.name in shared) and path.name != "calibration.py"
    ]
    lines = [line for path in files for line in path.read_text("utf-8").splitlines()]
    written = sum(bool(line.strip()) for line in lines)
    with capsys.disabled():
        print(f" core: {written} lines that are not blank, {len(lines)} by wc -l")  # noqa: T201
    assert written <= MOST_CORE_LINES


def test_no_literal_means_the_method_of_a_recipe() -> None:
    """A command that compared a method with "stf" would leave out its siblings.

    The demo names the folder of its own merge by stf.
    """
    literal = {
        path
        for path, tree in modules("host", "report", "sweep", "cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "stf"
    }
    assert literal == {"cli/demo.py"}


def test_no_file_prints_outside_the_command_line() -> None:
    printing = [
        path
        for path, tree in modules()
        if not path.startswith("cli/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert printing == []
