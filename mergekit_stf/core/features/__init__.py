"""From a task matrix to its singular features; what a decomposition costs is decided here."""

from mergekit_stf.core.features.decompose import choose_route, decompose
from mergekit_stf.core.features.features import Features, combine, kept_rank, spectrum_ranks

__all__ = ["Features", "choose_route", "combine", "decompose", "kept_rank", "spectrum_ranks"]
