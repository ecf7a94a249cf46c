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
        from mergekit_stf.host.autoload import activate as register_or_warn
    except ModuleNotFoundError:
        return
    register_or_warn()


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
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = HostLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class HostLoader:
    """Stands in for the host's own loader until the module runs, then steps aside."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Run the host's module as its own loader would, then register the method."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        activate()
