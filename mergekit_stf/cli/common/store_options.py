"""The options of the store, which ``merge`` and ``sweep`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from mergekit_stf.host.store.store import DEFAULT_SIZE

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

F = TypeVar("F", bound=Callable[..., Any])


def size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Return the bytes of a number with K, M, G or T behind it, for powers of 1000."""
    text = value.upper().removesuffix("B")
    number = text.rstrip("KMGT")
    unit = UNITS.get(text[len(number) :])
    if unit is None or not (number.isascii() and number.isdecimal()):
        raise click.BadParameter(f"{value!r} is no size; write for example 500M or 20G")
    return int(number) * unit


def add_store_options(command: F) -> F:
    """Add ``--keep-store`` and ``--store-size``, as ``keep_store`` and ``store_size``."""
    limit = click.option(
        "--store-size",
        callback=size,
        default=f"{DEFAULT_SIZE // 10**9}G",
        show_default=True,
        help="Most bytes that the store may take.",
    )
    keep = click.option(
        "--keep-store", is_flag=True, help="Keep merged matrices for other values of lambda."
    )
    return keep(limit(command))
