"""A tensor that is named and not read yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint of a model.

    Attributes:
        model: the model.
        name: under which the checkpoint stores the tensor.
        shape: of the tensor.
        dtype: of the tensor.
    """

    model: ModelReference
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it will be when it has been read."""
        return torch.device("cpu")

    def load(self) -> Tensor:
        """Read the tensor."""
        tensor: Tensor = LoaderCache().get(self.model).get_tensor(self.name)
        return tensor


def as_tensor(source: Tensor | StoredTensor) -> Tensor:
    """Return a tensor, read if it is only named."""
    return source.load() if isinstance(source, StoredTensor) else source
