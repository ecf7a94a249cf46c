"""The program ``mergekit-stf``, also as ``python -m mergekit_stf``."""

from __future__ import annotations

import io
import os
import signal
import sys


def run() -> None:
    """Run the command line, without a traceback when it is interrupted or nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # λ in a code page of Windows
    try:
        from mergekit_stf.cli.common.errors import UNREAD
        from mergekit_stf.cli.main import main

        main(prog_name="mergekit-stf")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was begun.")
    except SystemExit as end:
        if end.code == UNREAD:
            _discard_output()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is the interpreter's own end


def _discard_output() -> None:
    """Let what is still buffered go nowhere, as the last flush of a closed pipe fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


if __name__ == "__main__":
    run()
