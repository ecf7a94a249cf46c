"""Write a merge of adapters as a full model, shard by shard."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.io.tensor_writer import TensorWriter
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_stf.core.lowrank import LowRank
from mergekit_stf.host.adapter_merge import merge_weight
from mergekit_stf.host.adapter_plan import AdapterPlan

COMPANIONS = [
    "config.json",
    "generation_config.json",
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "processor_config.json",
    "*preprocessor_config.json",
]


def write_model(
    plan: AdapterPlan, config: MergeConfiguration, options: MergeOptions, out: Path
) -> None:
    """Write the merged model: every tensor of the base, changed where an adapter touches it.

    Tensors keep their names and, without ``dtype`` or ``out_dtype`` in the recipe, their types. A
    sum is formed in float32 or better and rounded once; no other copy of the model is made.

    Args:
        plan: what the adapters change.
        config: the recipe, for its types.
        options: the host's; ``out_shard_size``, ``quiet`` and ``trust_remote_code`` are used.
        out: an existing directory.
    """
    loader = LoaderCache().get(plan.base)
    shards = loader.index.tensor_paths
    writer = TensorWriter(str(out), max_shard_size=options.out_shard_size)
    asked = dtype_from_name(config.out_dtype or config.dtype)
    for name in tqdm(sorted(shards, key=lambda n: (shards[n], n)), disable=options.quiet):
        tensor = loader.get_tensor(name)
        dtype = _out_dtype(plan, name, tensor, asked)
        writer.save_tensor(name, merge_tensor(plan, name, tensor, dtype))
    writer.finalize()
    _write_companions(plan, asked, options.trust_remote_code, out)


def merge_tensor(plan: AdapterPlan, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one tensor of the output.

    Args:
        plan: what the adapters change.
        name: the tensor's name in the base's checkpoint.
        tensor: what the checkpoint stores under that name.
        dtype: the type of the result.
    """
    touched = plan.touched.get(name)
    delta = None if touched is None else merge_weight(touched, lambda: tensor)
    if delta is None:
        return tensor.to(dtype)
    if isinstance(delta, LowRank):
        return delta.add_to(tensor, dtype)
    compute = torch.promote_types(tensor.dtype, delta.dtype)
    return (tensor.to(compute) + delta.to(compute)).to(dtype)


def _out_dtype(
    plan: AdapterPlan, name: str, tensor: Tensor, asked: torch.dtype | None
) -> torch.dtype:
    if name in plan.planned:
        return plan.planned[name].out_dtype
    return asked if asked is not None and tensor.is_floating_point() else tensor.dtype


def _write_companions(
    plan: AdapterPlan, dtype: torch.dtype | None, trust_remote_code: bool, out: Path
) -> None:
    folder = Path(plan.base.model.path)
    for file in {file for pattern in COMPANIONS for file in folder.glob(pattern)}:
        shutil.copy(file, out / file.name)
    if dtype is not None:
        settings = plan.base.config(trust_remote_code)
        settings.dtype = dtype
        settings.save_pretrained(out)
