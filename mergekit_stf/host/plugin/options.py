"""The host's command-line options, for our commands that take the same ones."""

from mergekit.options import MergeOptions, PrettyPrintHelp, ShardSizeParamType, add_merge_options

__all__ = ["MergeOptions", "PrettyPrintHelp", "ShardSizeParamType", "add_merge_options"]
