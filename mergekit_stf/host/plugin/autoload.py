"""The registration that follows an import of mergekit, or one warning that says why there is none.

The start-up hook (``docs/autoload.md``) calls :func:`activate` while another program imports
mergekit, so nothing here may let an exception out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings

from packaging.specifiers import SpecifierSet

REQUIREMENT = ">=0.1.5,<0.2"


def activate() -> None:
    """Register our methods with the host, or warn once that this host is not one we know.

    A host outside :data:`REQUIREMENT` is left alone even if the registration would go through:
    nothing says that its arguments still mean the same. A host without metadata is tried.
    """
    installed = installed_host()
    try:
        if installed is not None and not is_supported(installed):
            _warn_once(f"mergekit {installed} is installed and mergekit{REQUIREMENT} is needed")
            return
        from mergekit_stf.host.plugin.method import register_with_mergekit

        register_with_mergekit()
    except Exception as error:
        if type(error).__name__ == "_DeadlockError":
            return  # another thread imports this package, and calls this function at its end
        found = "of unknown version" if installed is None else installed
        _warn_once(f"mergekit {found} refused it ({type(error).__name__}: {error})")


def installed_host() -> str | None:
    """Return the version in mergekit's metadata, ``None`` where it has none."""
    try:
        return importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_supported(version: str) -> bool:
    """Say whether a version of mergekit lies in :data:`REQUIREMENT`, pre-releases included."""
    return SpecifierSet(REQUIREMENT).contains(version, prereleases=True)


@functools.cache
def _warn_once(reason: str) -> None:
    message = (
        f"the merge methods of mergekit-stf are not available: {reason}. Install a matching pair "
        f"with pip install --upgrade mergekit-stf 'mergekit{REQUIREMENT}', or set "
        "MERGEKIT_STF_AUTOLOAD=0 to leave mergekit alone."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, and mergekit's import must go on
        logging.getLogger(__name__).warning(message)
