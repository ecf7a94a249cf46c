"""Text that comes from files, made safe to print."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """Write control characters, lone surrogates and invisible marks as Python does: ``\\x1b``.

    A terminal obeys such characters, and a line break forges a line.

    Args:
        text: any text.
        keep: characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
