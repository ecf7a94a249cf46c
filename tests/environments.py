"""Fresh Python environments, for tests of the package as a user gets it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mergekit_stf

ROOT = Path(__file__).parent.parent
"""The repository, or what an sdist carries of it."""
PACKAGE = Path(mergekit_stf.__file__).parent
"""The package that is tested: the repository's, or an installed one where no source lies."""
SOURCE = (ROOT / "mergekit_stf").is_dir()
"""Whether the package's source lies beside the tests."""
LIBRARIES = "zz_libraries.pth"
STARTUP = ("_mergekit_stf_autoload.py", "mergekit_stf_autoload.pth", "mergekit_stf_autoload.start")


def build_wheel(into: Path) -> Path:
    """Build the wheel as ``pip install .`` does, with the build backend that is installed.

    Where a wheel is tested that has been built already, it is that one.
    """
    if built := os.environ.get("MERGEKIT_STF_WHEEL"):
        return Path(built)
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(into))
    run([sys.executable, "-m", "pip", "wheel", "--quiet", *flags, str(ROOT)])
    return next(into.glob("*.whl"))


def build_editable(into: Path) -> Path:
    """Build the wheel that ``pip install -e .`` puts into an environment (PEP 660)."""
    if not SOURCE:
        pytest.skip("there is no source to install from")
    code = "import sys; from hatchling.build import build_editable as b; print(b(sys.argv[1]))"
    return into / run([sys.executable, "-c", code, str(into)], cwd=ROOT).stdout.split()[-1]


def run(
    command: list[str], *, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, with ``variables`` added to the environment."""
    outcome = attempt(command, cwd=cwd, **variables)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome


def attempt(
    command: list[str], *, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever comes of it, without the variables that steer an interpreter."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "COVERAGE", "MERGEKIT_STF"))
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


class Environment:
    """A virtual environment that holds nothing, not even pip, until a test puts it there."""

    def __init__(self, path: Path, interpreter: str = sys.executable) -> None:
        """Make the environment in ``path``."""
        run([interpreter, "-m", "venv", "--without-pip", str(path)])
        self.path = path
        self.python = next(path.glob("[bS]*/python*"))
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.site = Path(self(code).stdout.strip())

    def __call__(
        self, code: str, *flags: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code that must succeed."""
        return run([str(self.python), *flags, "-c", code], cwd=self.path, **variables)

    def pip(self, *arguments: str) -> None:
        """Run the pip of the tests' own environment upon this one."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python)]
        run([*pip, *arguments], cwd=self.path)

    def install(self, wheel: Path) -> None:
        """Install one wheel without its dependencies."""
        self.pip("install", "--quiet", "--no-deps", "--no-index", str(wheel))

    def link_libraries(self) -> None:
        """Make the tests' libraries importable, mergekit among them, after what is installed here.

        Only their folders go on the path: start-up files in them are not run a second time.
        """
        paths = sysconfig.get_paths()
        folders = dict.fromkeys((paths["purelib"], paths["platlib"]))
        self.write(LIBRARIES, "\n".join(folders) + "\n")

    def unlink_libraries(self) -> None:
        """Undo ``link_libraries``, so that pip sees this environment alone."""
        (self.site / LIBRARIES).unlink()

    def write(self, name: str, text: str) -> None:
        """Write one file of a stand-in package into the environment."""
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def files(self) -> set[Path]:
        """Return every file of the environment."""
        return {path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file()}
