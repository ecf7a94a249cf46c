"""The bytes of tensors: compared, digested, and ordered by."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor


def content_of(x: Tensor) -> Tensor:
    """Return the bytes of a tensor, flat."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Say whether two tensors of one type hold the same bits."""
    return torch.equal(content_of(x), content_of(y))


def digest(x: Tensor) -> str:
    """Return a digest of a tensor's bytes, which depends on their places too."""
    return xxhash.xxh3_128_hexdigest(content_of(x).cpu().numpy().data)


def checksum(x: Tensor) -> int:
    """Return the sum of a tensor's bytes in words of eight, the same on every device.

    It does not depend on their places: a tensor with its rows permuted has the same.
    """
    content = content_of(x)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())
