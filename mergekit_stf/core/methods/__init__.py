"""The merge methods, one file each; ``register`` makes one known to everything else."""

from __future__ import annotations

from mergekit_stf.core.methods.consensus_ta import ConsensusTA
from mergekit_stf.core.methods.iso_c import IsoC
from mergekit_stf.core.methods.iso_cts import IsoCTS
from mergekit_stf.core.methods.knots import KnOTS
from mergekit_stf.core.methods.localize_stitch import LocalizeAndStitch
from mergekit_stf.core.methods.metagpt import MetaGPT
from mergekit_stf.core.methods.method import Kind, Merged, Method, combined, describe
from mergekit_stf.core.methods.options import RANK, Option
from mergekit_stf.core.methods.pcb import PCB
from mergekit_stf.core.methods.stf import SuperposeFeatures, superpose
from mergekit_stf.core.methods.tsv_m import TSVM
from mergekit_stf.core.methods.wudi import Wudi

__all__ = [
    "RANK",
    "RECOMMENDED",
    "Kind",
    "Merged",
    "Method",
    "Option",
    "combined",
    "describe",
    "get",
    "known",
    "names",
    "register",
    "superpose",
]

RECOMMENDED = "wudi"
"""The method for whoever has no reason for another: it needs no scale chosen on data."""

_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name.

    Raises:
        ValueError: there is another one of that name.
    """
    known = _METHODS.setdefault(method.name, method)
    if type(known) is not type(method):
        raise ValueError(f"there is a merge method {method.name!r} already")


def get(name: str) -> Method:
    """Return the method of that name.

    Raises:
        KeyError: there is none.
    """
    return _METHODS[name]


def is_known(name: object) -> bool:
    """Say whether a method of that name is registered."""
    return name in _METHODS


def names() -> tuple[str, ...]:
    """Return the names of all methods, in the order in which they were registered."""
    return tuple(_METHODS)


for _method in (
    SuperposeFeatures(),
    Wudi(),
    TSVM(),
    IsoC(),
    IsoCTS(),
    KnOTS(),
    PCB(),
    ConsensusTA(),
    LocalizeAndStitch(),
    MetaGPT(),
):
    register(_method)
