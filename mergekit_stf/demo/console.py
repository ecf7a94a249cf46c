"""``mergekit-yaml`` on several recipes of the demo, in one process that imports mergekit once.

Run as ``python -m mergekit_stf.demo.console METHOD...`` in the demo's directory; prints a line with
the method and its seconds for each merge that is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from importlib.metadata import entry_points


def main(methods: list[str]) -> None:
    """Call what the console script ``mergekit-yaml`` calls, once for each method."""
    (script,) = entry_points(group="console_scripts", name="mergekit-yaml")
    mergekit_yaml = script.load()
    for method in methods:
        start, partial = time.perf_counter(), f"merged/{method}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr):
            arguments = [f"recipes/{method}.yml", partial, "--quiet"]
            mergekit_yaml.main(arguments, prog_name="mergekit-yaml", standalone_mode=False)
        os.replace(partial, f"merged/{method}")
        sys.stdout.write(f"{method} {time.perf_counter() - start:.2f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
