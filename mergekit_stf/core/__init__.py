"""The engine: tensors in, tensors out. It imports torch and the standard library only."""

from mergekit_stf.core.decompose import decompose
from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features import Features
from mergekit_stf.core.solve import Solution, solve
from mergekit_stf.core.superpose import Report, Superposition, superpose
from mergekit_stf.core.trim import trim

__all__ = [
    "Features",
    "Report",
    "STFError",
    "Solution",
    "Superposition",
    "decompose",
    "solve",
    "superpose",
    "trim",
]
