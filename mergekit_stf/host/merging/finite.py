"""Values that a type can hold: every weight is looked at once before it is rounded and written."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import torch
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures.loading import parameter_names
from mergekit_stf.host.architectures.names import kind_of
from mergekit_stf.host.diagnostics.notices import Notice

WIDER = (torch.bfloat16, torch.float64)
"""What to write instead, the first that holds the value: bfloat16 reaches as far as float32."""


def round_weight(
    name: str, x: Tensor, dtype: torch.dtype, inputs: Sequence[tuple[str, Tensor]] = ()
) -> Tensor:
    """Return a weight in the type in which it is written.

    Rounding is monotonic, so the extreme entries decide.

    Args:
        name: of the weight.
        x: its entries, in the type in which they were computed.
        dtype: the type to write.
        inputs: names and tensors of what it was made of, unless they are known to be finite.

    Raises:
        STFError: an input is not finite, or an entry is not finite after rounding.
    """
    if dtype.is_floating_point and not _holds(dtype, extremes := _extremes(x)):
        check_finite(name, inputs)
        raise STFError(f"{name}: {_overflow(float(extremes.abs().max()), x.dtype, dtype)}")
    return x.to(dtype)


def copy_weight(
    name: str, x: Tensor, dtype: torch.dtype, model: Hashable
) -> tuple[Tensor, tuple[Notice, ...]]:
    """Return a weight as a model has it, in the type in which it is written, and what to say of it.

    Old versions of transformers stored attention masks, whose entries may be infinite on purpose.
    They fill no parameter of the model's class, and are copied with a notice.

    Args:
        name: of the weight.
        x: its entries in the model.
        dtype: the type to write.
        model: the model, where it is one of the host's references.

    Raises:
        STFError: an entry is NaN, or infinite in a parameter, or too large for the type.
    """
    if not is_finite(x) and not x.isnan().any() and not _fills_parameter(name, model):
        kind = kind_of(name)
        text = f"{kind} holds infinite entries in the base and is no parameter; it is copied"
        return x.to(dtype), (Notice(f"infinite {kind}", text),)
    return round_weight(name, x, dtype, [("base_model", x)]), ()


def is_finite(x: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity; integers never do."""
    return bool(torch.isfinite(_extremes(x)).all())


def check_finite(name: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinity in the inputs.

    Args:
        name: of the weight.
        tensors: each model's name and tensor.

    Raises:
        STFError: with the model and the weight.
    """
    for label, x in tensors:
        if not is_finite(x):
            count = int(x.numel() - torch.isfinite(_comparable(x)).sum())
            raise STFError(
                f"{name}: {label} has {count} entries that are NaN or infinite; "
                "mend that checkpoint or leave the model out"
            )


def check_type(name: str, dtype: torch.dtype) -> None:
    """Refuse types that cannot hold a merged weight.

    Raises:
        STFError: the weight is quantised.
    """
    if dtype.itemsize < 2:
        raise STFError(
            f"{name}: {str(dtype).removeprefix('torch.')} weights differ between the models and "
            "cannot be merged; dequantise the checkpoints first, or set `dtype: bfloat16`"
        )


def _extremes(x: Tensor) -> Tensor:
    """Return the least and the greatest entry, NaN where there is one, the quickest such look."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if not x.is_floating_point() or not x.numel():
        return torch.zeros(2)
    return torch.stack(torch.aminmax(_comparable(x)))


def _comparable(x: Tensor) -> Tensor:
    """Return types of one byte in float32: torch neither compares nor tests them."""
    return x.float() if x.dtype.itemsize == 1 else x


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Say whether a type has values within half a step of these; torch may clip to fp8 silently."""
    info = torch.finfo(dtype)
    return bool((values.abs().double() <= info.max * (1 + info.eps / 4)).all())


def _overflow(largest: float, computed: torch.dtype, dtype: torch.dtype) -> str:
    short, wide = (str(d).removeprefix("torch.") for d in (dtype, computed))
    value = torch.tensor(largest, dtype=torch.float64)
    remedy = next((wider for wider in WIDER if _holds(wider, value)), None)
    if remedy is None:
        return (
            f"merging it overflows {wide} (its largest entry became {largest:g}), because entries "
            "of the models, or `weight` or `lambda`, are too large; lower these, or leave out the "
            "model with the largest entries"
        )
    return (
        f"its largest entry is {largest:g}, and {short} ends at {torch.finfo(dtype).max:g}; "
        f"write `out_dtype: {str(remedy).removeprefix('torch.')}`"
    )


@functools.lru_cache(maxsize=1024)
def _fills_parameter(name: str, model: Hashable) -> bool:
    """Say whether a class of transformers reads a weight; where the class is unknown, it does not.

    Without a model of the host there is nothing to ask, and a tensor counts as a parameter.
    """
    if not isinstance(model, ModelReference):
        return True
    names = parameter_names(model.config(trust_remote_code=LoaderCache().trust_remote_code))
    return names is not None and names.fills_parameter(name)
