"""The engine: tensors in, tensors out. It imports torch and the standard library only."""

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features import Features, decompose
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.core.methods import Merged, Method, superpose
from mergekit_stf.core.record import Record
from mergekit_stf.core.solve import Solution, solve
from mergekit_stf.core.task_matrices import TaskMatrices
from mergekit_stf.core.trim import trim

__all__ = [
    "Features",
    "LowRank",
    "Merged",
    "Method",
    "Record",
    "STFError",
    "Solution",
    "TaskMatrices",
    "decompose",
    "solve",
    "superpose",
    "trim",
]
