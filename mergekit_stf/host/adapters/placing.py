"""An adapter whose factors are merged, brought to the names of the base's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.config import FULL_ROUTE
from mergekit_stf.host.adapters.names import KnownWeights, describe_renaming, misfit_error, resolve
from mergekit_stf.host.adapters.read import Adapter
from mergekit_stf.host.architectures.loading import ParameterNames
from mergekit_stf.host.planning.planned import PlannedWeight

LOG = logging.getLogger(__name__)


def place_adapter(
    adapter: Adapter,
    planned: Mapping[str, PlannedWeight],
    names: dict[str, str],
    loader: ParameterNames | None,
    base: ModelReference,
) -> Adapter:
    """Return the adapter with names that the base has.

    Args:
        adapter: as it was read.
        planned: the base's weights by their names in the checkpoint.
        names: the checkpoint's name for every known one; gets those that transformers adds.
        loader: what transformers makes of names, None where it has no class for the model.
        base: for messages.

    Raises:
        STFError: a tensor of the adapter fills nothing in the base.
    """
    unknown = sorted(adapter.weights - set(names))
    if not unknown:
        return adapter
    for stored in planned if loader is not None else ():
        names |= dict.fromkeys(_parameters(stored, loader), stored)
    shapes = {name: planned[stored].header.shape for name, stored in names.items()}
    found = resolve(adapter.shapes, KnownWeights(shapes, names, loader))
    if found is None:
        raise _unplaced_error(
            adapter, sorted(adapter.weights - set(names)) or unknown, loader, base
        )
    if found:
        LOG.warning(
            "%s: its names are not the base's: %s", adapter.source, describe_renaming(found)
        )
    return adapter.rename(found)


def _parameters(stored: str, loader: ParameterNames | None) -> set[str]:
    """Return the parameter that a stored weight fills by itself, if there is one."""
    found = set() if loader is None else loader.of(stored)
    return found if len(found) == 1 else set()


def module_name(name: str, stored: str, loader: ParameterNames | None) -> str:
    """Return the name by which PEFT finds a weight: that of its parameter."""
    if loader is None or name in loader:
        return name
    return next(iter(_parameters(stored, loader)), name)


def _unplaced_error(
    adapter: Adapter, unknown: list[str], loader: ParameterNames | None, base: ModelReference
) -> STFError:
    some = f"{', '.join(unknown[:3])}{' and others' if len(unknown) > 3 else ''}"
    if unknown[0] in LoaderCache().get(base).index.tensor_paths:
        return STFError(
            f"{adapter.source} changes {some}: the base's checkpoint stores it, but mergekit "
            "merges it as a part of a stack of experts, or its table of the architecture does not "
            f"name it; {FULL_ROUTE}"
        )
    if loader is not None and unknown[0] in loader:
        return STFError(
            f"{adapter.source} changes {some}: the base's checkpoint has no weight of that name, "
            "since it has tied weights; save the base with weights of their own "
            "(tie_word_embeddings: false), or leave the adapter out"
        )
    shape = adapter.shapes[unknown[0]]
    labels = shape[0] if len(shape) == 2 else None
    return misfit_error(adapter.source, str(base), unknown, adapter.config.task_type, labels)


def use_stored_names(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """Return the adapter with the names in the base's checkpoint.

    Raises:
        STFError: two of its names mean one weight.
    """
    stored: dict[str, str] = {}
    for name in sorted(adapter.weights):
        other = stored.setdefault(names[name], name)
        if other != name:
            raise STFError(
                f"{adapter.source} changes {names[name]} twice, as {other} and as {name}; "
                "save it again with PEFT"
            )
    return adapter.rename({name: names[name] for name in adapter.weights})
