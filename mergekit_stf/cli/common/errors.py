"""Exit codes, and the one place where exceptions become a line on the terminal.

====  ==========================================================
0     done
1     a recipe, an input or an output is wrong; the line says which
2     the command line is wrong
3     ``verify`` found a difference
4     the system failed: disk full, no permission, out of memory
70    a fault of ours; set ``MERGEKIT_STF_TRACEBACK=1`` and report what it prints
130   interrupted with Ctrl-C
141   who read the output has closed it, as ``| head`` does
143   ended by SIGTERM
====  ==========================================================
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

import click

from mergekit_stf.cli.common.terminal import echo

OK, WRONG, DIFFERENT, SYSTEM, FAULT, INTERRUPTED = 0, 1, 3, 4, 70, 130
UNREAD, TERMINATED = 141, 143
VARIABLE = "MERGEKIT_STF_TRACEBACK"
Handler = Callable[[int, "FrameType | None"], None]
NOTHING = "Nothing is left half done; run the same command again."


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, it is no error of the program."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn every exception of a command into one message and an exit code."""
    came: list[int] = []
    try:
        with _sigterm(came):
            yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except (KeyboardInterrupt, Terminated) as error:
        echo(f"Interrupted. {' '.join(_notes(error)) or NOTHING}", err=True)
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        raise SystemExit(code) from None
    except BrokenPipeError:
        raise SystemExit(UNREAD) from None
    except Exception as error:
        if came:  # a library has made an error of its own of what came out of the signal's handler
            echo(f"Interrupted. {' '.join(_notes(error)) or NOTHING}", err=True)
            raise SystemExit(TERMINATED) from None
        if os.environ.get(VARIABLE):
            raise
        code, lines = explain_exception(error)
        for number, line in enumerate([*lines, *_notes(error)]):
            echo(line if number else f"Error: {line}", err=True)
        raise SystemExit(code) from None


def explain_exception(error: Exception) -> tuple[int, Sequence[str]]:
    """Return the exit code for an exception, and its message, line by line."""
    from mergekit_stf.core.errors import STFError  # costs the import of torch

    if isinstance(error, STFError):
        return WRONG, error.args
    code, message = _foreign(error)
    return code, [message]


def _foreign(error: Exception) -> tuple[int, str]:
    text = " ".join(str(error).split())
    if _is_full(error, text):
        return SYSTEM, f"no space left on the disk ({text}); make room and run the command again"
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return (
            SYSTEM,
            f"out of memory ({text[:200]}); --out-shard-size 1B or fewer models lower the need",
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return SYSTEM, f"{where}{error.strerror or text}"
    if _is_of_the_host(error):
        return WRONG, f"mergekit refused the merge: {type(error).__name__}: {text}"
    hint = f"set {VARIABLE}=1 for the traceback and report it"
    return FAULT, f"unexpected {type(error).__name__}: {text}; {hint}"


def _notes(error: BaseException) -> list[str]:
    """Return what those that an exception has passed say about what is kept."""
    return list(getattr(error, "__notes__", ()))


def _is_full(error: Exception, text: str) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text


def _is_of_the_host(error: Exception) -> bool:
    """Whether the innermost frame that is ours or the host's is the host's."""
    origin = ""
    trace = error.__traceback__
    while trace is not None:
        package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        origin = package if package in ("mergekit", "mergekit_stf") else origin
        trace = trace.tb_next
    return origin == "mergekit"


@contextmanager
def end_at_once() -> Iterator[None]:
    """End the process on a signal, for a block that changes nothing, such as imports.

    An exception out of a signal handler would not do: what it passes in an import may take it for
    a missing module, or print it and go on.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        os.write(2, f"Interrupted. {NOTHING}\n".encode())
        os._exit(128 + number)

    with _handling({signal.SIGINT: handler, signal.SIGTERM: handler}):
        yield


def _sigterm(came: list[int]) -> AbstractContextManager[None]:
    """Raise ``Terminated`` on SIGTERM, and keep in ``came`` that it did."""

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated

    return _handling({signal.SIGTERM: handler})


@contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Handle signals in a block, where that is possible: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] is not signal.SIG_IGN:  # by nohup, or a shell for what runs beside it
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
