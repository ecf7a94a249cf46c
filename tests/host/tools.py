"""Runs commands of mergekit as mergekit installs them, each in a child of one process.

``python -m tests.host.tools CASES`` reads a JSON object of command lines by label, runs each in
the folder of that label, and prints a JSON object of exit codes. It imports nothing of the package,
so the start-up hook alone decides whether the package has a say.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path

import torch

IMPORTED_LATE = {"mergekit-evolve"}  # it needs packages that mergekit itself does not ask for
LOG = "log.txt"


def commands() -> dict[str, str]:
    """Return the module of every console script of mergekit."""
    scripts = entry_points(group="console_scripts")
    return {
        script.name: script.module for script in scripts if script.module.startswith("mergekit.")
    }


def run(words: list[str], folder: Path) -> int:
    """Run one command in a child, with fixed seeds, and return its exit code."""
    folder.mkdir(parents=True)
    child = os.fork()
    if not child:
        log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os._exit(_main(words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _main(words: list[str]) -> int:
    random.seed(0)
    torch.manual_seed(0)
    sys.argv = words
    code = 0
    try:
        importlib.import_module(commands()[words[0]]).main(words[1:], prog_name=words[0])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    """Run every case and say which command ended how, and which of our modules were there."""
    for name, module in commands().items():
        if name not in IMPORTED_LATE:
            importlib.import_module(module)
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    codes = {label: run(words, Path(label)) for label, words in cases.items()}
    sys.stdout.write(json.dumps({"codes": codes, "ours": "mergekit_stf" in sys.modules}))


if __name__ == "__main__":
    main()
