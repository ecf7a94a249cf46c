"""A merge method of the tests: the plain sum of each task's leading features."""

from collections.abc import Mapping
from typing import Any

from mergekit_stf.core import TaskMatrices
from mergekit_stf.core.methods import RANK, Merged, Method, combined, describe, register
from mergekit_stf.host.plugin import method as plugin


class LeadingSum(Method):
    """``M = Σ_i Σ_{k ≤ rank} s_k u_k v_kᵀ`` over the leading features of every task."""

    name = "leading_sum"
    title = "Sum of leading features"
    reference = "a toy of the tests"
    options = (RANK,)

    def merge(self, tasks: TaskMatrices, options: Mapping[str, Any]) -> Merged:
        features = tasks.features(options["rank"])
        M = combined(tasks, features, [f.s for f in features])
        return Merged(M, describe(tasks, M, features))


register(LeadingSum())
plugin.register_with_mergekit()
