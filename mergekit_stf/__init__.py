"""Merge models that were tuned from one base: STF and other merge methods for mergekit.

Importing this package makes its methods known to mergekit, as in ``merge_method: stf``, whether
mergekit is imported before, later or never; it imports neither mergekit nor torch itself. An
installed package does the same by itself when the interpreter starts (``docs/autoload.md``).

Public are ``merge_weights``, ``plan``, ``merge``, ``Plan`` and ``STFError``, which are loaded when
they are first asked for (``docs/python.md``).
"""

import _mergekit_stf_autoload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mergekit_stf.interface import Plan, STFError, merge, merge_weights, plan

__all__ = ["Plan", "STFError", "__version__", "merge", "merge_weights", "plan"]

__version__ = "0.1.0"

_mergekit_stf_autoload.arm()


def __getattr__(name: str) -> object:
    """Load the public interface when something of it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mergekit_stf import interface

    value: object = getattr(interface, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List what is public, loaded or not."""
    return sorted({*globals(), *__all__})
