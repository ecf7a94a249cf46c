"""Every kind of failure has its exit code and one line."""

from __future__ import annotations

import errno
import os
import signal

import click
import pytest
from mergekit.common import dtype_from_name

from mergekit_stf.cli.common import errors
from mergekit_stf.core.errors import STFError
from tests.cli.merges import run


def host_error() -> Exception:
    try:
        dtype_from_name("float3")
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mrege", "no command 'mrege'; did you mean 'merge'?"),
        ("Doctor", "no command 'Doctor'; did you mean 'doctor'?"),
        ("xyz", "no command 'xyz'; there are demo, init, plan, merge, "),
    ],
)
def test_a_misspelt_command_names_the_one_that_is_meant(word: str, expected: str) -> None:
    failed = run(word)
    assert failed.exit_code == 2
    assert f"Error: {expected}" in failed.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (STFError("a: b"), 1, "a: b"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "no space left on the disk"),
        (RuntimeError("Error: No space left on device (os error 28)"), 4, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 4, "/x: Permission denied"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to\nallocate"), 4, "out of memory (CUDA out of"),
        (KeyError("x"), 70, "unexpected KeyError: 'x'; set MERGEKIT_STF_TRACEBACK=1"),
        (host_error(), 1, 'mergekit refused the merge: RuntimeError: Unimplemented dtype "float3"'),
    ],
)
def test_every_exception_is_one_line(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, errors.report_errors():
        raise error
    assert caught.value.code == code
    output = capsys.readouterr().err
    assert output.startswith(f"Error: {text}")
    assert output.count("\n") == 1


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: int, code: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, errors.report_errors():
        signal_self(number)
    assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_click_raises_is_left_to_click() -> None:
    with pytest.raises(click.UsageError), errors.report_errors():
        raise click.UsageError("x")


def test_a_traceback_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_STF_TRACEBACK", "1")
    with pytest.raises(KeyError), errors.report_errors():
        raise KeyError("x")


def fail_after_a_signal() -> None:
    try:
        signal_self(signal.SIGTERM)
    except BaseException:
        raise ValueError("could not determine the shape of object type") from None


def test_a_signal_that_a_library_turns_into_an_error_is_still_a_signal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Out of a signal's handler an exception may fall into compiled code, which hides it."""
    with pytest.raises(SystemExit) as caught, errors.report_errors():
        fail_after_a_signal()
    assert caught.value.code == 143
    assert capsys.readouterr().err == f"Interrupted. {errors.NOTHING}\n"
