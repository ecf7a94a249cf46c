"""The host's question «which weights does this merge have?», with more of an answer.

The host asks once, before anything else, and so do our commands. Quantised checkpoints are found
here, and what the base's class does not use is added (``quantised.py``, ``unused.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_stf.core import methods
from mergekit_stf.host import compat
from mergekit_stf.host.architectures.unused import Unused, add_unused, find_unused
from mergekit_stf.host.checkpoints.dequantised import DequantisingLoader
from mergekit_stf.host.checkpoints.quantised import Quantised, find_quantisation, quantised_error
from mergekit_stf.host.diagnostics import notices

ELSEWHERE = (
    "mergekit-stf merge dequantises them while it reads; mergekit-yaml would write a model whose "
    "configuration still calls its weights quantised"
)

_ours = ContextVar("ours", default=False)


def architecture_of(
    config: MergeConfiguration, options: MergeOptions, dequantise: bool = True
) -> tuple[ModelArchitecture, Unused]:
    """Return the weights of a merge, with the tensors that the base's class does not use.

    Quantised checkpoints that can be read are put into the host's cache of open files, and every
    later reader gets ordinary weights.

    Args:
        config: the recipe.
        options: the host's options.
        dequantise: whether quantised checkpoints that can be read are; else they are refused too.

    Raises:
        STFError: a model is quantised in a way that cannot be read.
    """
    LoaderCache().setup(options=options)
    base = config.base_model
    for model, found in check_quantised(config, options, dequantise).items():
        _open(model, found)
    architecture: ModelArchitecture = compat.host_architecture(config, options)
    if not methods.is_known(config.merge_method) or base is None:
        return architecture, Unused(str(base), "")
    unused = find_unused(architecture, config, options)
    return add_unused(architecture, unused, config), unused


@contextmanager
def our_merge() -> Iterator[None]:
    """Say that the merge in this block is one of ours.

    It mends the output's configuration, so that the host may read quantised checkpoints, and has
    said what becomes of tensors without a use.
    """
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def install() -> None:
    """Give the host our answer where the method is ours; for other methods nothing changes."""
    compat.replace_architecture_question(_for_host)


def _for_host(config: MergeConfiguration, options: MergeOptions) -> ModelArchitecture:
    if not methods.is_known(config.merge_method):
        return compat.host_architecture(config, options)
    ours = _ours.get()
    architecture, unused = architecture_of(config, options, dequantise=ours)
    warning = unused.warning()
    if warning and not ours:
        notices.say_once(warning)
    return architecture


def check_quantised(
    config: MergeConfiguration, options: MergeOptions, dequantise: bool = True
) -> dict[ModelReference, Quantised]:
    """Return the quantised models of a recipe, all of which can be dequantised on read.

    Raises:
        STFError: a model, or the base of an adapter that the host merges into it, cannot.
    """
    base, quantised = config.base_model, {}
    for model in sorted(config.referenced_models(), key=lambda m: (m != base, str(m))):
        found = find_quantisation(ModelReference(model=model.model), options)
        if found is None:
            continue
        if model.lora or not found.pairs:
            raise quantised_error(model, found)
        if not dequantise:
            raise quantised_error(model, found, ELSEWHERE)
        quantised[model] = found
    return quantised


def _open(model: ModelReference, found: Quantised) -> None:
    """Put a loader that dequantises into the host's cache."""
    loader = LoaderCache().get(model)
    if not isinstance(loader, DequantisingLoader):
        compat.keep_open(model, DequantisingLoader(loader, found))
