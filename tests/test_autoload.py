"""The start-up hook by itself: a bare interpreter, a stand-in host, a stand-in package."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.environments import ROOT, STARTUP, Environment

CODEC_OF_EVERY_PTH_FILE = "encodings.utf_8_sig"  # from Python 3.13 on
HOST = "mergekit/merge_methods/__init__.py"
PACKAGE = "mergekit_stf/host/plugin/autoload.py"
COUNT = "import sys; sys.activations = getattr(sys, 'activations', 0) + 1"
REPORT = "import sys; print(getattr(sys, 'activations', 0))"
FINDERS = "import sys; print([type(f).__name__ for f in sys.meta_path].count('HostFinder'))"


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
    """The start-up files, a host, and a package that counts how often it is asked to register."""
    environment = Environment(tmp_path / "bare")
    for name in STARTUP:
        shutil.copy(ROOT / "autoload" / name, environment.site)
    environment.write("mergekit/__init__.py", "")
    environment.write(HOST, "loaded = True\n")
    environment.write("mergekit_stf/__init__.py", "")
    environment.write("mergekit_stf/host/__init__.py", "")
    environment.write(PACKAGE, f"def activate():\n    {COUNT}\n")
    return environment


def activations(environment: Environment, code: str, *flags: str, **variables: str) -> int:
    outcome = environment(f"{code}\n{REPORT}", *flags, **variables)
    assert outcome.stderr == ""
    return int(outcome.stdout.split()[-1])


def test_registers_once_the_host_has_run_and_not_before(bare: Environment) -> None:
    bare.write(
        PACKAGE, f"import mergekit.merge_methods as m\ndef activate():\n    m.loaded; {COUNT}\n"
    )
    assert activations(bare, "import mergekit") == 0
    assert activations(bare, "import mergekit.merge_methods") == 1
    assert activations(bare, "from mergekit.merge_methods import loaded", "-I") == 1


def test_a_bare_start_loads_one_module_more(bare: Environment) -> None:
    code = "import sys; print(*sorted(sys.modules))"
    without = bare(code, MERGEKIT_STF_AUTOLOAD="0").stdout.split()
    assert set(bare(code).stdout.split()) == set(without)
    for name in STARTUP:
        (bare.site / name).unlink()
    added = set(without) - set(bare(code).stdout.split())
    assert added - {CODEC_OF_EVERY_PTH_FILE} == {"_mergekit_stf_autoload"}


def test_a_bare_start_costs_less_than_a_millisecond(bare: Environment) -> None:
    def microseconds() -> int:
        lines = bare("", "-X", "importtime").stderr.splitlines()
        (line,) = [line for line in lines if line.endswith("_mergekit_stf_autoload")]
        return int(line.split("|")[1])

    assert min(microseconds() for _ in range(10)) < 1000


def test_the_variable_switches_the_hook_off(bare: Environment) -> None:
    assert bare(FINDERS).stdout.split() == ["1"]
    assert bare(FINDERS, MERGEKIT_STF_AUTOLOAD="1").stdout.split() == ["1"]
    assert bare(FINDERS, MERGEKIT_STF_AUTOLOAD="0").stdout.split() == ["0"]
    assert activations(bare, "import mergekit.merge_methods", MERGEKIT_STF_AUTOLOAD="0") == 0


def test_no_site_means_no_hook(bare: Environment) -> None:
    assert bare(FINDERS, "-S").stdout.split() == ["0"]


def test_arming_twice_puts_one_finder(bare: Environment) -> None:
    arm = "import _mergekit_stf_autoload as hook; hook.arm(); hook.start()\n"
    assert bare(arm + FINDERS).stdout.split() == ["1"]
    assert activations(bare, arm + "import mergekit.merge_methods\n" + arm) == 1


def test_arming_late_registers_at_once(bare: Environment) -> None:
    code = "import mergekit.merge_methods, _mergekit_stf_autoload as hook; hook.arm()"
    assert activations(bare, code, MERGEKIT_STF_AUTOLOAD="0") == 1


def test_the_host_keeps_its_own_loader(bare: Environment) -> None:
    code = (
        "import mergekit.merge_methods as m, inspect, importlib.machinery as machinery\n"
        "assert type(m.__loader__) is type(m.__spec__.loader) is machinery.SourceFileLoader\n"
        "assert inspect.getsource(m) == 'loaded = True\\n'\n"
    )
    assert activations(bare, code) == 1


def test_looking_for_the_host_does_not_register(bare: Environment) -> None:
    code = "import importlib.util as u; s = u.find_spec('mergekit.merge_methods')\n"
    assert activations(bare, code + "assert s.loader.get_source(s.name) == 'loaded = True\\n'") == 0
    assert activations(bare, code + "import mergekit.merge_methods") == 1


def test_the_host_can_be_loaded_again(bare: Environment) -> None:
    first = "import mergekit.merge_methods as m, importlib, sys\n"
    assert activations(bare, first + "importlib.reload(m)") == 2
    assert (
        activations(bare, first + "del sys.modules[m.__name__]; import mergekit.merge_methods") == 2
    )


def test_a_host_that_fails_keeps_its_error_and_its_second_chance(bare: Environment) -> None:
    bare.write(HOST, "import os\nif 'BROKEN' in os.environ: raise OSError('its own')\n")
    code = (
        "import os\n"
        "try: import mergekit.merge_methods\n"
        "except OSError as error: assert str(error) == 'its own'\n"
        "del os.environ['BROKEN']\n"
        "import mergekit.merge_methods\n"
    )
    assert activations(bare, code, BROKEN="1") == 1


def test_threads_that_import_together_register_once(bare: Environment) -> None:
    bare.write(HOST, "import time; time.sleep(0.2); loaded = True\n")
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def load(i):\n"
        "    import mergekit.merge_methods as m\n"
        "    return m.loaded\n"
        "with ThreadPoolExecutor(8) as pool: assert all(pool.map(load, range(8)))\n"
    )
    assert activations(bare, code) == 1


def test_children_have_the_hook_too(bare: Environment) -> None:
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FINDERS!r}], check=True)"
    )
    assert bare(code).stdout.split() == ["1"]


def test_finders_of_others_are_asked(bare: Environment) -> None:
    code = (
        "import sys, importlib.machinery as machinery\n"
        "class Other:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        found = machinery.PathFinder.find_spec(name, path, target)\n"
        "        if found: found.origin = 'other'\n"
        "        return found\n"
        "sys.meta_path.insert({place}, Other())\n"
        "import mergekit.merge_methods as m\n"
        "assert m.__spec__.origin == 'other'\n"
    )
    assert activations(bare, code.format(place=1)) == 1


FINDERS_OF_OTHERS = {
    "find_module alone": "class f:\n    @staticmethod\n    def find_module(name, path=None): pass",
    "a class": "class f:\n    @classmethod\n    def find_spec(cls, *arguments): return None",
    "None": "f = None",
    "nothing to call": "f = object()",
    "a finder that raises": "class f:\n    @staticmethod\n    def find_spec(name, *rest):\n"
    "        if name == 'mergekit.merge_methods': raise ImportError('not today')",
    "an old loader": "class f:\n    @staticmethod\n    def find_spec(name, *rest):\n"
    "        if name != 'mergekit.merge_methods': return None\n"
    "        return machinery.ModuleSpec(name, Old())",
    "find_module with an old loader": "class f:\n    @staticmethod\n"
    "    def find_module(name, path=None):\n"
    "        return Old() if name == 'mergekit.merge_methods' else None",
}
OLD_LOADER = """
import sys, importlib.machinery as machinery, types, warnings
warnings.simplefilter("ignore")
class Old:
    def load_module(self, name):
        module = types.ModuleType(name)
        module.loaded = "by an old loader"
        module.__loader__ = self
        sys.modules[name] = module
        return module
"""


@pytest.mark.parametrize("finder", FINDERS_OF_OTHERS)
def test_finders_of_others_are_asked_as_without_us(bare: Environment, finder: str) -> None:
    code = (
        f"{OLD_LOADER}\n{FINDERS_OF_OTHERS[finder]}\nsys.meta_path.insert(1, f)\n"
        "try:\n    import mergekit.merge_methods as m\n"
        "except Exception as error: print(type(error).__name__, str(error))\n"
        "else: print(m.loaded, type(m.__loader__).__name__, type(m.__spec__.loader).__name__)\n"
    )
    without = bare(code, MERGEKIT_STF_AUTOLOAD="0").stdout
    *seen, count = bare(f"{code}{REPORT}").stdout.splitlines(keepends=True)
    assert "".join(seen) == without
    assert int(count) == (0 if "Error" in without else 1)


@pytest.mark.parametrize("left", ["the line", "the hook", "a broken hook"])
def test_half_uninstalled_is_silent(bare: Environment, left: str) -> None:
    shutil.rmtree(bare.site / "mergekit_stf")
    if left == "the line":
        (bare.site / "_mergekit_stf_autoload.py").unlink()
    if left == "a broken hook":
        bare.write("_mergekit_stf_autoload.py", "this is no Python")
    outcome = bare("import mergekit.merge_methods as m; print(m.loaded)", "-W", "error")
    assert (outcome.stdout, outcome.stderr) == ("True\n", "")


@pytest.mark.parametrize("damage", ["this is no Python", "1 / 0"])
def test_a_damaged_package_leaves_the_host_alone(bare: Environment, damage: str) -> None:
    bare.write(PACKAGE, damage)
    outcome = bare("import mergekit.merge_methods as m; print(m.loaded)", "-W", "error")
    assert outcome.stdout == "True\n"
    (line,) = outcome.stderr.splitlines()
    expected = "are not available: mergekit_stf cannot be imported ("
    assert expected in line
