"""The host's command-line options, for our commands that take the same ones."""

from typing import Any

from mergekit.options import MergeOptions, PrettyPrintHelp, ShardSizeParamType, add_merge_options

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.recipe.keys import did_you_mean

__all__ = [
    "MergeOptions",
    "PrettyPrintHelp",
    "ShardSizeParamType",
    "add_merge_options",
    "options_from",
]


def options_from(given: dict[str, Any]) -> MergeOptions:
    """Return the host's options, of which these are set.

    Raises:
        STFError: the host has no option of such a name.
    """
    known = list(MergeOptions.model_fields)
    for name in given:
        if name not in known:
            raise STFError(f"mergekit has no option {name!r}{did_you_mean(name, known)}")
    return MergeOptions(**given)
