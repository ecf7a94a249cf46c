"""The conditions of a merge that its lock file holds, each a value of a known kind and range.

A lock may come from anybody. What is not listed here is no part of one: no path, no address.
"""

from __future__ import annotations

import platform
from typing import Annotated

import torch
from mergekit.common import dtype_from_name
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mergekit_stf.host.provenance.machine import instructions, switches

NOT_RECORDED = frozenset(
    {
        "transformers_cache",
        "lora_merge_cache",
        "verbosity",
        "quiet",
        "num_threads",
        "async_write",
        "write_threads",
        "lazy_unpickle",
        "write_model_card",
    }
)
"""Options of the host that change no byte of the output, or that name a place on a machine."""


class Conditions(BaseModel):
    """A part of a lock: no key is unknown, no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Options(Conditions):
    """The host's options that can change the output, by the host's names."""

    allow_crimes: bool
    unsafe_truncate_embeddings: bool
    lora_merge_dtype: str | None
    cuda: bool
    device: str
    low_cpu_memory: bool
    out_shard_size: Annotated[int, Field(ge=1)]
    copy_tokenizer: bool
    clone_tensors: bool
    trust_remote_code: bool
    random_seed: Annotated[int, Field(ge=0, lt=2**32)] | None
    safe_serialization: bool
    read_to_gpu: bool
    multi_gpu: bool
    gpu_rich: bool

    @field_validator("lora_merge_dtype")
    @classmethod
    def _is_type(cls, value: str | None) -> str | None:
        try:
            dtype_from_name(value)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("device")
    @classmethod
    def _is_device(cls, value: str) -> str:
        try:
            torch.device(value)
        except RuntimeError as error:
            raise ValueError(f"no device of torch: {value!r}") from error
        return value

    @classmethod
    def of(cls, options: MergeOptions) -> Options:
        """Return what is recorded of the host's options."""
        return cls.model_validate(options.model_dump(exclude=set(NOT_RECORDED)))

    def restore(self, cache: str | None, trust_remote_code: bool) -> MergeOptions:
        """Return the host's options for the same merge.

        Args:
            cache: where hub models are kept; a lock has no say in this.
            trust_remote_code: whether the user allows it, which a lock cannot.
        """
        given = self.model_dump() | {"trust_remote_code": trust_remote_code}
        return MergeOptions(**given, transformers_cache=cache, quiet=True)


class Machine(Conditions):
    """What else is known to change bits.

    Attributes:
        system: the operating system.
        architecture: of the processor.
        python: its version.
        vectors: the processor's vector instructions.
        kernels: settings outside of the recipe that choose kernels, or ``default``.
    """

    system: str
    architecture: str
    python: str
    vectors: str
    kernels: str


def describe_machine() -> Machine:
    """Describe this machine."""
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python=platform.python_version(),
        vectors=instructions(),
        kernels=switches(),
    )
