"""Commands in processes of their own, forked from one that has imported everything already.

Importing torch and mergekit takes seconds; forking takes milliseconds. The server that forks
computes nothing itself, so its children start without threads.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mergekit_stf.host.run.merge", "mergekit_stf.cli.main"])


@dataclass
class Running:
    """A command that has been started, and the file with what it says."""

    process: BaseProcess
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    def until(self, path: Path, pattern: str = "*", seconds: float = 60) -> None:
        """Wait until a file of that pattern is in the folder ``path``."""
        end = time.monotonic() + seconds
        while not (path.is_dir() and any(path.glob(pattern))):
            assert time.monotonic() < end, f"nothing in {path}: {self.text}"
            assert self.process.is_alive(), f"ended early: {self.text}"
            time.sleep(0.001)


def start(
    *arguments: object,
    log: Path,
    pretend_free: bool = False,
    program: str = "mergekit-stf",
    first: Path | None = None,
) -> Running:
    """Start a program with these arguments.

    Args:
        arguments: of its command line.
        log: gets all that it says.
        pretend_free: let it believe that there is room on the disk.
        program: ``mergekit-stf``, or ``mergekit-yaml`` of the host.
        first: a file of Python that it imports before all else.
    """
    words = [str(argument) for argument in arguments]
    process = CONTEXT.Process(target=_command, args=(words, str(log), pretend_free, program, first))
    process.start()
    return Running(process, log)


def run(*arguments: object, log: Path, **how: Any) -> tuple[int, str]:
    """Run a program to its end, see `start`; return its exit code and all that it says."""
    running = start(*arguments, log=log, **how)
    return running.wait(), running.text


def _command(
    words: list[str], log: str, pretend_free: bool, program: str, first: Path | None
) -> None:
    import torch
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    from mergekit_stf.cli.main import main

    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    if pretend_free:
        shutil.disk_usage = lambda _: SimpleNamespace(free=2**60)
    if first is not None:
        sys.path.insert(0, str(first.parent))
        importlib.import_module(first.stem)
    (mergekit_yaml if program == "mergekit-yaml" else main)(words, prog_name=program)
