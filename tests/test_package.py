"""The wheel, normal and editable, in an environment of its own: installed, used, taken away."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mergekit_stf import __version__
from mergekit_stf.host.plugin.autoload import REQUIREMENT, is_supported
from tests.environments import (
    PACKAGE,
    ROOT,
    STARTUP,
    Environment,
    attempt,
    build_editable,
)
from tests.host.models import save_family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FINDERS = "import sys; print([type(f).__name__ for f in sys.meta_path].count('HostFinder'))"
METHODS = (
    "import mergekit.merge_methods as m; print(*[x.spec.name for x in m.registered_methods()])"
)
FOREIGN_HOST = {
    "mergekit/__init__.py": "",
    "mergekit/merge_methods/__init__.py": "loaded = True\n",
}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The wheel beside the libraries of the tests."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(wheel)
    environment.link_libraries()
    return environment


def test_the_wheel_holds_the_package_and_the_start_up_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mergekit_stf", f"mergekit_stf-{__version__}.dist-info", *STARTUP}
    package = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.*")}
    assert {name for name in package if "__pycache__" not in name} <= set(names)


def test_the_start_up_line_is_one_line_and_the_start_file_names_a_function(
    wheel: Path, environment: Environment
) -> None:
    archive = zipfile.ZipFile(wheel)
    (line,) = archive.read("mergekit_stf_autoload.pth").decode("ascii").splitlines()
    assert line.startswith("import ")
    assert len(line) < 150
    environment.write(STARTUP[0], archive.read(STARTUP[0]).decode("utf-8"))
    (entry,) = archive.read("mergekit_stf_autoload.start").decode("ascii").split()
    resolve = f"import pkgutil; pkgutil.resolve_name({entry!r})()\n"
    assert environment(resolve + FINDERS).stdout.split() == ["1"]


@pytest.mark.parametrize("editable", [False, True], ids=["normal", "editable"])
def test_an_install_arms_and_an_uninstall_leaves_nothing(
    environment: Environment, wheel: Path, tmp_path: Path, editable: bool
) -> None:
    before = environment.files()
    environment.install(build_editable(tmp_path) if editable else wheel)
    heavy = "; import mergekit_stf; print('torch' in sys.modules, 'mergekit' in sys.modules)"
    assert environment(FINDERS + heavy).stdout.split() == ["1", "False", "False"]
    environment.pip("uninstall", "--yes", "mergekit-stf")
    assert environment.files() == before
    outcome = environment(FINDERS)
    assert (outcome.stdout, outcome.stderr) == ("0\n", "")


def test_the_host_finds_the_method(installed: Environment) -> None:
    assert "stf" in installed(METHODS, "-I").stdout.split()
    assert "stf" not in installed(METHODS, MERGEKIT_STF_AUTOLOAD="0").stdout.split()


@pytest.mark.parametrize(
    ("switch", "code"),
    [
        ("0", "import mergekit_stf"),
        ("0", "import mergekit_stf.host.plugin.method"),
        (
            "1",
            "import mergekit.merge_methods as m, importlib; importlib.reload(m)\n"
            "from mergekit_stf.host.plugin.method import register_with_mergekit as register\n"
            "register(); register()",
        ),
    ],
    ids=["package", "method", "everything twice"],
)
def test_an_import_of_ours_is_enough_and_changes_nothing_else(
    installed: Environment, switch: str, code: str
) -> None:
    flags = ("-W", "error::RuntimeWarning")
    outcome = installed(f"{code}\n{METHODS}", *flags, MERGEKIT_STF_AUTOLOAD=switch)
    assert outcome.stdout.split().count("stf") == 1
    assert outcome.stderr == ""


def test_threads_may_import_both_at_once(installed: Environment) -> None:
    names = [
        "mergekit.merge_methods",
        "mergekit_stf.host.plugin.method",
        "mergekit_stf",
        "mergekit.plan",
    ]
    code = (
        "from importlib import import_module\nfrom concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(8) as pool: list(pool.map(import_module, {names * 2}))\n"
    )
    outcome = installed(code + METHODS)
    assert outcome.stdout.split().count("stf") == 1
    assert "not available" not in outcome.stderr


def test_the_core_works_without_the_host(installed: Environment) -> None:
    hide = "import sys; sys.modules['mergekit'] = None; import importlib, pkgutil\n"
    load = (
        "import mergekit_stf.core as c; print(*[m.name for m in pkgutil.iter_modules(c.__path__)])"
    )
    names = installed(hide + load).stdout.split()
    assert "errors" in names
    installed(hide + "\n".join(f"import mergekit_stf.core.{name}" for name in names))


@pytest.mark.parametrize("version", ["0.2.0", "0.1.4", "1.0"])
def test_another_host_gets_one_clear_warning(
    environment: Environment, wheel: Path, version: str
) -> None:
    metadata = f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n"
    environment.write(f"mergekit-{version}.dist-info/METADATA", metadata)
    check_the_warning(environment, wheel, f"mergekit {version} is installed", REQUIREMENT)


def test_a_host_that_refuses_the_method_gets_one_clear_warning(
    environment: Environment, wheel: Path
) -> None:
    metadata = "Metadata-Version: 2.1\nName: mergekit\nVersion: 0.1.5\n"
    environment.write("mergekit-0.1.5.dist-info/METADATA", metadata)
    check_the_warning(environment, wheel, "mergekit 0.1.5 refused it (", REQUIREMENT)


def check_the_warning(environment: Environment, wheel: Path, *parts: str) -> None:
    environment.install(wheel)
    for name, text in FOREIGN_HOST.items():
        environment.write(name, text)
    environment.link_libraries()
    reload = "import importlib, mergekit.merge_methods as m; importlib.reload(m); print(m.loaded)"
    for flags in (("-W", "always"), ("-W", "error")):
        outcome = environment(reload, *flags)
        assert outcome.stdout == "True\n"
        assert outcome.stderr.count("the merge methods of mergekit-stf are not available") == 1
        assert all(part in outcome.stderr for part in (*parts, "pip install", "AUTOLOAD=0"))


def test_the_requirement_is_one_and_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"mergekit{REQUIREMENT}" in project["dependencies"]
    verdicts = {"0.1.4": False, "0.1.5": True, "0.1.12": True, "0.2.0rc1": False, "1": False}
    assert {version: is_supported(version) for version in verdicts} == verdicts


def run_yaml(environment: Environment, recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run what the console script ``mergekit-yaml`` runs."""
    command = [str(environment.python), "-m", "mergekit.scripts.run_yaml", str(recipe)]
    out = str(recipe.parent / "merged")
    return attempt([*command, out], cwd=environment.path, HF_HUB_OFFLINE="1")


def test_mergekit_yaml_knows_the_method_until_the_package_is_gone(
    environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    made = save_family("llama", tmp_path, tasks=1)
    recipe = tmp_path / "recipe.yml"
    models = f"base_model: {made.base}\nmodels:\n  - model: {made.tuned[0]}\n"
    recipe.write_text(f"merge_method: stf\n{models}", encoding="utf-8")
    environment.install(wheel)
    environment.link_libraries()
    outcome = run_yaml(environment, recipe)
    assert outcome.returncode == 0, outcome.stderr
    assert list((tmp_path / "merged").glob("*.safetensors"))
    environment.unlink_libraries()
    environment.pip("uninstall", "--yes", "mergekit-stf")
    environment.link_libraries()
    outcome = run_yaml(environment, recipe)
    assert outcome.returncode != 0
    assert "Unimplemented merge method stf" in outcome.stderr
