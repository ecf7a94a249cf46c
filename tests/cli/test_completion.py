from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPLETE = "import sys; from mergekit_stf.cli.main import main; main(prog_name='mergekit-stf')"


def complete(words: str, importtime: bool = False) -> subprocess.CompletedProcess[str]:
    position = len(words.split(" ")) - 1
    asked = {
        "_MERGEKIT_STF_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
    }
    flags = ["-X", "importtime"] if importtime else []
    return subprocess.run(
        [sys.executable, *flags, "-c", COMPLETE],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mergekit-stf re", "plain,report\n"),
        ("mergekit-stf --ver", "plain,--version\n"),
        ("mergekit-stf report --sam", "plain,--sample\n"),
        ("mergekit-stf doctor --j", "plain,--json\n"),
    ],
)
def test_completion_answers_without_torch(words: str, expected: str) -> None:
    done = complete(words, importtime=True)
    assert done.stdout == expected
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert "torch" not in imported


def test_a_shell_gets_its_script() -> None:
    script = subprocess.run(
        [sys.executable, "-c", COMPLETE],
        env={**os.environ, "_MERGEKIT_STF_COMPLETE": "zsh_source"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "#compdef mergekit-stf" in script
