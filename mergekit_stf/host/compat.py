"""What we use of mergekit and transformers that is no public interface of theirs.

Checked with mergekit 0.1.5 and transformers 5.23; after another release of either, look here first.
Everything else that we import from them is public, and ``tests/test_layout.py`` holds that no other
module touches a name of theirs with an underscore. This module imports none of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mergekit.architecture
from mergekit.architecture import ModelArchitecture
from mergekit.architecture import get_architecture_info as host_architecture

# mergekit 0.1.5: lists of all JSON tables, by nothing and by class, into which ours are put.
from mergekit.architecture.json_definitions import JSON_ARCHITECTURES, NAME_TO_ARCH

# mergekit 0.1.5: turns the text of a JSON table into a table.
from mergekit.architecture.json_definitions import (
    _load_architecture_json as load_architecture_json,
)
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache, SaveTensor
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

# transformers 5.23: how the names in a checkpoint become parameters, and back.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

# transformers 5.23: builds a model without starting its weights.
from transformers.initialization import no_init_weights

# transformers 5.23: the values of a stack of experts in mxfp4.
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

__all__ = [
    "JSON_ARCHITECTURES",
    "NAME_TO_ARCH",
    "PrefixChange",
    "WeightConverter",
    "WeightRenaming",
    "close_checkpoints",
    "computed_parameters",
    "convert_moe_packed_tensors",
    "executing",
    "find_loader",
    "get_model_conversion_mapping",
    "host_architecture",
    "keep_open",
    "load_architecture_json",
    "no_init_weights",
    "output_config",
    "rename_source_key",
    "replace_architecture_question",
    "replace_saving",
    "stored_state",
]


def output_config(
    config: MergeConfiguration, architecture: ModelArchitecture, trust_remote_code: bool
) -> PretrainedConfig:
    """Return the configuration that mergekit 0.1.5 would write with a merge.

    Imported here, for our registration may follow an import of ``mergekit.merge`` half-way.
    """
    from mergekit.merge import _model_out_config

    return _model_out_config(config, architecture, trust_remote_code=trust_remote_code)


def replace_architecture_question(answer: Callable[..., ModelArchitecture]) -> None:
    """Let mergekit 0.1.5 ask us which weights a merge has, wherever it has imported the question.

    ``mergekit.merge`` may be half imported, for our registration follows one of its imports.
    """
    question = host_architecture.__name__
    for module in (mergekit.architecture, sys.modules.get("mergekit.merge")):
        if hasattr(module, question):
            setattr(module, question, answer)


def replace_saving(execute: Callable[..., None]) -> None:
    """Let mergekit 0.1.5 write a weight by another function."""
    SaveTensor.execute = execute


@contextmanager
def executing(executor: Callable[..., Any]) -> Iterator[None]:
    """Let ``run_merge`` of mergekit 0.1.5 hand its tasks to another executor in the block.

    Args:
        executor: gets the targets and the devices, and returns what has mergekit's method ``run``.
    """
    import mergekit.merge

    with patch.object(mergekit.merge, "Executor", executor):
        yield


def close_checkpoints() -> None:
    """Forget the files that mergekit 0.1.5 keeps open, in a class, for all merges of a process."""
    LoaderCache.loaders.clear()


def keep_open(model: ModelReference, loader: LazyTensorLoader) -> None:
    """Let mergekit 0.1.5 read a model by this loader."""
    LoaderCache.loaders[model] = loader


def find_loader(model: ModelReference) -> LazyTensorLoader | None:
    """Return the loader of a model that mergekit 0.1.5 has opened already, None if it has not."""
    return LoaderCache.loaders.get(model)


def computed_parameters(model: PreTrainedModel) -> Sequence[str]:
    """Return patterns of parameters that transformers 5.23 computes where none is stored."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def stored_state(
    model: PreTrainedModel, conversions: Sequence[Any], names: Iterable[str]
) -> Mapping[str, Tensor]:
    """Return parameters as transformers 5.23 would save them, after undoing these conversions."""
    model._weight_conversions = list(conversions)
    state = model.state_dict()
    kept = {name: state[name] for name in names}
    reverted: Mapping[str, Tensor] = revert_weight_conversion(model, kept) if conversions else kept
    return reverted
