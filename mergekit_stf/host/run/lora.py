"""From a recipe of adapters to a folder that holds the merged model or the merged adapter."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_stf.host.checkpoints.files import write_text
from mergekit_stf.host.checkpoints.inputs import input_models, input_places
from mergekit_stf.host.diagnostics.finished import HOST_RECIPE
from mergekit_stf.host.diagnostics.records import FILE_NAME, Recorder
from mergekit_stf.host.lora.adapter_file import Module, write_adapter
from mergekit_stf.host.lora.jobs import AdapterJobs
from mergekit_stf.host.lora.model import write_model
from mergekit_stf.host.lora.plan import plan_adapters
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.outputs.check import OutputCheck, check_output
from mergekit_stf.host.outputs.config import settle_files
from mergekit_stf.host.outputs.workspace import Workspace
from mergekit_stf.host.provenance.card import make_card
from mergekit_stf.host.provenance.digests import Digests
from mergekit_stf.host.provenance.lock import make_lock, write_lock
from mergekit_stf.host.recipe.recipe import Recipe
from mergekit_stf.host.run.network import heed_offline_mode

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterMerge:
    """What a merge of adapters did.

    Attributes:
        adapters: how many were merged.
        weights: how many weights of the base they change.
        modules: those of the written adapter, none for a full model.
    """

    adapters: int
    weights: int
    modules: tuple[Module, ...]


@heed_offline_mode()
def merge_to_model(
    recipe: Recipe, out: Path, options: MergeOptions, force: bool = False, locked: bool = False
) -> AdapterMerge:
    """Merge the adapters of a recipe into their base, and write a full model.

    Args:
        recipe: of a method of ours over models ``base+adapter``.
        out: the output directory; it appears when it is complete.
        options: the host's.
        force: replace an earlier output.
        locked: write a lock file, which takes reading all inputs and outputs once more.

    Raises:
        STFError: the recipe, an adapter or ``out`` is not what it must be.
    """

    def write(jobs: AdapterJobs, folder: Path) -> list[Module]:
        write_model(jobs, recipe.config, options, folder)
        settle_files(Path(jobs.plan.base.model.path), folder)
        return []

    with Workspace(out, force, input_places(recipe, options)) as work:
        return _merge(recipe, options, work, write, ("lora",), locked)


@heed_offline_mode()
def merge_to_adapter(
    recipe: Recipe,
    out: Path,
    options: MergeOptions,
    max_rank: int | None = None,
    force: bool = False,
    locked: bool = False,
) -> AdapterMerge:
    """Merge the adapters of a recipe into one adapter.

    The base's weights are read only where an adapter stores a whole weight.

    Args:
        recipe: of a method of ours over models ``base+adapter``.
        out: the output directory; it appears when it is complete.
        options: the host's.
        max_rank: truncate to this rank; without it the rank is the sum of the adapters' ranks.
        force: replace an earlier output.
        locked: write a lock file.

    Raises:
        STFError: as `merge_to_model`, or a weight that no adapter of that rank can hold.
    """

    def write(jobs: AdapterJobs, folder: Path) -> list[Module]:
        return write_adapter(jobs, recipe.config, folder, max_rank)

    shortened = () if max_rank is None else ("--max-rank", str(max_rank))
    with Workspace(out, force, input_places(recipe, options)) as work:
        return _merge(recipe, options, work, write, ("lora", "--adapter", *shortened), locked)


def _merge(
    recipe: Recipe,
    options: MergeOptions,
    work: Workspace,
    write: Callable[[AdapterJobs, Path], list[Module]],
    command: tuple[str, ...],
    locked: bool,
) -> AdapterMerge:
    """Merge, and describe the merge in the files that ``mergekit-stf merge`` writes too."""
    folder = work.output
    inputs = input_models(recipe.config, options) if locked else []
    with contextlib.closing(Recorder(folder / FILE_NAME)) as records, Digests(inputs) as digests:
        desk = Desk(recorder=records)
        jobs = AdapterJobs(plan_adapters(recipe.config, options), desk)
        modules = write(jobs, folder)
        desk.notices.close()
        check = None if modules else _check(jobs, folder)
        library = "peft" if modules else "transformers"
        written = make_card(recipe.config, recipe.text, folder.name, library, locked)
        write_text(folder / "README.md", written)
        write_text(folder / HOST_RECIPE, recipe.text)
        if locked:
            found = digests.result()
            lock = make_lock(recipe.text, options, inputs, found, folder, command, check)
            write_lock(lock, folder)
    work.publish()
    plan = jobs.plan
    return AdapterMerge(len(plan.adapters), len(plan.touched), tuple(modules))


def _check(jobs: AdapterJobs, folder: Path) -> OutputCheck:
    """Check a model; its values were looked at before they were rounded."""
    check = check_output(folder, jobs.plan.base, infinite=jobs.infinite)
    for notice in check.notices():
        LOG.warning("%s", notice)
    return check
