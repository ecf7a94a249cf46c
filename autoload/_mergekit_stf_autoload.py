"""Makes ``merge_method: stf`` known to mergekit, at the moment when mergekit is imported.

Every interpreter start imports this file (``mergekit_stf_autoload.pth``; from Python 3.15
``mergekit_stf_autoload.start``), so it imports nothing that a bare interpreter has not loaded
already, ``__future__`` and ``typing`` included. See ``docs/autoload.md``.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

HOST = "mergekit.merge_methods"
SWITCH = "MERGEKIT_STF_AUTOLOAD"


def start() -> None:
    """Arm the hook when the interpreter starts, unless ``MERGEKIT_STF_AUTOLOAD`` is ``0``."""
    if os.environ.get(SWITCH) != "0":
        arm()


def arm() -> None:
    """Put the finder in front of ``sys.meta_path``; register at once if the host is loaded.

    A second call changes nothing: what is imported while the finder stands there is registered
    by the finder, in the thread that holds the host's import lock.
    """
    if any(isinstance(finder, HostFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, HostFinder())
    if HOST in sys.modules:
        activate()


def activate() -> None:
    """Register the method with the host, or do nothing if only this file is left of us."""
    try:
        from mergekit_stf.host.plugin.autoload import activate as register_or_warn
    except ModuleNotFoundError:
        return
    except Exception as error:  # whatever is wrong with us, the import of the host goes on
        complain(error)
        return
    register_or_warn()


def complain(error: Exception) -> None:
    """Say in one line that our own package cannot be imported."""
    if type(error).__name__ == "_DeadlockError":
        return  # another thread imports the package, and registers the method at its end
    import logging

    logging.getLogger(__name__).warning(
        "the merge methods of mergekit-stf are not available: "
        "mergekit_stf cannot be imported (%s: %s); "
        "pip install --force-reinstall --no-deps mergekit-stf",
        type(error).__name__,
        error,
    )


class HostFinder:
    """Finds ``mergekit.merge_methods`` through the finders behind it, and nothing else.

    It stays on ``sys.meta_path`` after its work: taking an element out of that list while another
    thread walks it makes that thread skip a finder, and a host that is imported anew, after a
    failure or a purge of ``sys.modules``, needs the method again.
    """

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the host's spec with a loader that registers the method after the import."""
        if name != HOST:
            return None
        finders = iter(tuple(sys.meta_path))
        for finder in finders:
            if finder is self:
                break
        for finder in finders:
            spec = ask(finder, name, path, target)
            if spec is not None:
                watch(spec)
                return spec
        return None


def ask(
    finder: "Any",
    name: str,
    path: "Sequence[str] | None",
    target: "ModuleType | None",
) -> "ModuleSpec | None":
    """Ask one finder as this interpreter's import system asks it.

    Python 3.10 and 3.11 call ``find_module`` of a finder without ``find_spec``, later ones pass
    such a finder by. What the finder raises is the caller's, as in an import without the hook.
    """
    try:
        find_spec = finder.find_spec
    except AttributeError:
        legacy = getattr(sys.modules["_frozen_importlib"], "_find_spec_legacy", None)
        return legacy(finder, name, path) if legacy else None
    return find_spec(name, path, target)  # type: ignore[no-any-return]


def watch(spec: "ModuleSpec") -> None:
    """Let the method be registered after the module of a spec has run, by whichever loader."""
    loader = spec.loader
    if loader is None or isinstance(loader, StandIn):
        return
    kind = HostLoader if hasattr(loader, "exec_module") else OldHostLoader
    spec.loader = kind(loader, spec)  # type: ignore[assignment]


class StandIn:
    """Stands in for the host's own loader until the module runs, then steps aside."""

    def __init__(self, loader: "Any", spec: "ModuleSpec") -> None:
        self.loader = loader
        self.spec = spec

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)


class HostLoader(StandIn):
    """The stand-in for a loader that runs a module that the import system has made."""

    def exec_module(self, module: "ModuleType") -> None:
        """Run the host's module as its own loader would, then register the method."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        activate()


class OldHostLoader(StandIn):
    """The stand-in for a loader of the old kind, which makes the module itself."""

    def load_module(self, name: str) -> "ModuleType":
        """Load the host's module as its own loader would, then register the method."""
        self.spec.loader = self.loader
        module: ModuleType = self.loader.load_module(name)
        activate()
        return module
