"""Write a merge of adapters as a full model, shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from mergekit_stf.host.checkpoints.headers import Header
from mergekit_stf.host.checkpoints.shards import write_shards
from mergekit_stf.host.lora.ahead import Ahead
from mergekit_stf.host.lora.jobs import AdapterJobs, Found
from mergekit_stf.host.lora.plan import AdapterPlan, TouchedWeight

COMPANIONS = (
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
)


SMALL = 128
"""Rank of a merged update up to which one core forms it faster than the system takes it."""


def write_model(
    jobs: AdapterJobs, config: MergeConfiguration, options: MergeOptions, out: Path
) -> None:
    """Write the merged model: every tensor of the base, changed where an adapter touches it.

    Tensors keep their names and, without ``dtype`` or ``out_dtype`` in the recipe, their types; no
    other copy of the model is made.

    Args:
        jobs: merge what the adapters change.
        config: the recipe, for its types.
        options: the host's; ``out_shard_size``, ``quiet`` and ``trust_remote_code`` are used.
        out: an existing directory.
    """
    plan = jobs.plan
    loader = LoaderCache().get(plan.base)
    shards = loader.index.tensor_paths
    asked = dtype_from_name(config.out_dtype or config.dtype)
    headers = {}
    for name in sorted(shards, key=lambda name: (shards[name], name)):
        tensor = loader.get_tensor(name)
        headers[name] = Header(tuple(tensor.shape), _out_dtype(plan, name, tensor, asked))
    progress = tqdm(total=len(headers), disable=options.quiet)

    def merged(name: str) -> Found | None:
        return jobs.merge_matrix(name, headers[name].dtype)

    with progress, _one_core_each(plan), Ahead(headers, merged) as ahead:

        def pieces(name: str) -> Iterator[Tensor]:
            found = ahead.take(name)
            yield from jobs.finish_in_blocks(
                name, found, loader.get_tensor(name), headers[name].dtype
            )
            progress.update()

        write_shards(headers, pieces, out, options.out_shard_size)
    _write_companions(plan, asked, options.trust_remote_code, out)


@contextmanager
def _one_core_each(plan: AdapterPlan) -> Iterator[None]:
    """Give the merging and the writing thread a core each where the products are small.

    More threads share such products at a loss, measured in ``docs/lora.md``.
    """
    threads = torch.get_num_threads()
    if all(_is_small(weight) for weight in plan.touched.values()):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _is_small(weight: TouchedWeight) -> bool:
    """Say whether a weight stays in factors of a rank at which writing takes longest."""
    changes = [change for change in weight.changes if change is not None]
    ranks = [change.factors.rank for change in changes if change.factors is not None]
    whole = any(change.replaced is not None for change in changes)
    return not whole and min(weight.planned.density) == 1 and sum(ranks) <= SMALL


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
