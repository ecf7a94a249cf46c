"""Models that are merged with each other are of one class of transformers."""

from __future__ import annotations

import json

from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import read_text
from mergekit_stf.host.checkpoints.inputs import locate


def check_classes(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse models of another class than the base, unless the host is told to allow it.

    Args:
        config: a recipe whose models ``input_models`` has found.
        options: the host's.

    Raises:
        STFError: with both models and their classes.
    """
    base = config.base_model
    if base is None or options.allow_crimes:
        return
    models = [base, *config.referenced_models()]
    classes = {
        str(one.model): json.loads(
            read_text(locate(one.model, options.transformers_cache) / "config.json")
        )["architectures"][0]
        for one in models
        if not one.override_architecture
    }
    expected = classes.get(str(base.model))
    for model, found in classes.items():
        if expected is not None and found != expected:
            raise STFError(
                f"{model} is a {found}, the base {base.model} a {expected}; "
                "only models that were tuned from one base can be merged"
            )
