"""What PEFT makes of an adapter: which of its tensors find a place in a base.

PEFT passes over tensors that it has no place for, and starts modules at random that an adapter's
configuration names and its file lacks. It is asked on the meta device, before any work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from mergekit.common import ModelReference, get_auto_cls
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.read import PREFIX
from mergekit_stf.host.compat import no_init_weights
from mergekit_stf.host.recipe.yaml_text import first_line

FAILURES = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What PEFT raises on adapters that it cannot use; it has no error class of its own."""


@dataclass(frozen=True)
class Placing:
    """How an adapter meets a base.

    Attributes:
        unplaced: its tensors that fill nothing.
        started: modules that its file lacks, which PEFT would start as if for training.
        stored: all that it stores.
    """

    unplaced: list[str]
    started: list[str]
    stored: dict[str, Tensor]


def build_hollow_base(base: ModelReference, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model that the host would load to put an adapter on it, without its weights."""
    settings = base.config(trust_remote_code)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = get_auto_cls(settings.architectures[0]).from_config(
            settings, trust_remote_code=trust_remote_code
        )
    return model


def place(reference: ModelReference, folder: Path, model: PreTrainedModel) -> Placing:
    """Ask PEFT where the tensors of an adapter go.

    Args:
        reference: base and adapter, for messages.
        folder: the adapter's files.
        model: the hollow base; PEFT wraps its modules.

    Raises:
        STFError: PEFT cannot put the adapter on the base at all.
    """
    with peft_errors(reference), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(str(folder))
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # some ways to start read the base's weights
        wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
        stored = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(wrapped, stored, low_cpu_mem_usage=True)
    unplaced = [key.removeprefix(PREFIX) for key in result.unexpected_keys]
    started = [key.removeprefix(PREFIX) for key in result.missing_keys if ".lora_" in key]
    return Placing(unplaced, started, {k.removeprefix(PREFIX): t for k, t in stored.items()})


@contextmanager
def peft_errors(reference: ModelReference) -> Iterator[None]:
    """Turn an error of PEFT into one line of ours."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise STFError(
            f"{reference}: PEFT cannot put this adapter on its base: {first_line(error)}; "
            "check that it was made on this base"
        ) from error
