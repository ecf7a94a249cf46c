"""Signals: steps that they do not interrupt, and what is said when they have."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WAITING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the end of the block, where they take effect.

    Only the main thread can do that, and only it gets signals; in others the block is as any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.getsignal(number) for number in WAITING}
    try:
        for number in WAITING:
            signal.signal(number, remember)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def add_note(error: BaseException, note: str) -> None:
    """Add a sentence to an exception, as ``BaseException.add_note`` of Python 3.11 does.

    The command line prints it: each layer that an exception passes says what it has kept.
    """
    error.__notes__ = [*getattr(error, "__notes__", ()), note]  # type: ignore[attr-defined]
