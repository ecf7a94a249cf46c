"""A merge whose output is either complete, with a lock file, or absent."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_stf.core import methods
from mergekit_stf.host.adapters.copies import copy_adapters
from mergekit_stf.host.architectures.all_weights import check_quantised, our_merge
from mergekit_stf.host.architectures.coverage import suspend_guard
from mergekit_stf.host.checkpoints.files import write_text
from mergekit_stf.host.checkpoints.inputs import InputModel, input_models, input_places
from mergekit_stf.host.diagnostics.records import FILE_NAME, Recorder
from mergekit_stf.host.executors.execution import Execution, Executor, InProcess
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.outputs.check import check_output
from mergekit_stf.host.outputs.config import settle_files
from mergekit_stf.host.outputs.workspace import Workspace
from mergekit_stf.host.planning.preflight import preflight
from mergekit_stf.host.plugin.method import host_method
from mergekit_stf.host.provenance.card import make_card
from mergekit_stf.host.provenance.digests import Digests, Known
from mergekit_stf.host.provenance.lock import Lock, make_lock, write_lock
from mergekit_stf.host.recipe.recipe import Recipe
from mergekit_stf.host.run.network import heed_offline_mode
from mergekit_stf.host.store.store import DEFAULT_SIZE, Store

LOG = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


class OrderedConfiguration(MergeConfiguration):
    """A recipe whose models come in an order that no hash seed changes.

    The host iterates over a set of them where it writes the card and builds a vocabulary.
    """

    def referenced_models(self) -> list[ModelReference]:
        """Return every model once, sorted by its reference."""
        return sorted(super().referenced_models(), key=str)


@dataclass(frozen=True)
class StoreOptions:
    """Where the store lies and what becomes of it.

    Attributes:
        folder: a folder of the user's, which is kept; None for one beside the output.
        size: most bytes it may take.
        keep: whether the one beside the output outlives a finished merge.
    """

    folder: Path | None = None
    size: int = DEFAULT_SIZE
    keep: bool = False


@dataclass(frozen=True)
class FinishedMerge:
    """A finished merge: its lock, and one line on what the store did."""

    lock: Lock
    store: str


@heed_offline_mode()
def merge_recipe(
    recipe: Recipe,
    out: Path,
    options: MergeOptions,
    store_options: StoreOptions | None = None,
    force: bool = False,
    known: Known | None = None,
    executor: Executor | None = None,
) -> FinishedMerge:
    """Check everything, merge beside ``out``, and put the result and its lock into place.

    Args:
        recipe: a checked recipe.
        out: the folder to write.
        options: the host's options.
        store_options: how to keep merged matrices while the merge runs.
        force: replace an earlier output.
        known: digests of inputs that the caller keeps from merge to merge.
        executor: runs the weights; this process where none is given.

    Raises:
        STFError: whatever is wrong, before or during the merge; ``out`` is then as it was.
    """
    wanted, runs = store_options or StoreOptions(), executor or InProcess()
    reads = input_places(recipe, options)
    with Workspace(out, force, reads, wanted.folder, wanted.keep) as work:
        config = OrderedConfiguration.model_validate(dict(recipe.config))
        models = input_models(config, options)
        if options.lora_merge_cache is None:
            options = options.model_copy(update={"lora_merge_cache": str(work.adapters)})
        check_quantised(config, options)
        copy_adapters(config, options, Path(options.lora_merge_cache or work.adapters))
        store = Store(work.store, wanted.size)
        for warning in preflight(config, options, work.folder, store, runs.spools):
            LOG.warning("%s", warning)
        records = contextlib.closing(Recorder(work.output / FILE_NAME))
        with store.writing_beside(), records as recorder, Digests(models, known) as digests:
            desk = Desk(store, recorder)
            execution = Execution(desk, store, config.referenced_models(), options, work.waiting)
            with runs.executing(execution) as devices:
                _run(desk, config, recipe.text, work.output, _host_options(config, models, options))
            desk.notices.close()
            found = digests.result()
            settle_files(_donor(config, models).folder, work.output)
            with work.settling():
                check = check_output(work.output, _base(config), _is_sliced(config))
                lock = make_lock(
                    recipe.text,
                    options,
                    models,
                    found,
                    work.output,
                    check=check,
                    workers=devices.names(),
                )
        for notice in check.notices():
            LOG.warning("%s", notice)
        write_lock(lock, work.output)
        work.publish()
        summary = store.summary()
    return FinishedMerge(lock, summary)


def _run(
    desk: Desk, config: MergeConfiguration, text: str, output: Path, options: MergeOptions
) -> None:
    written = make_card(config, text, output.name)
    ours = methods.is_known(config.merge_method)
    seat = host_method(config.merge_method).at(desk) if ours else contextlib.nullcontext()
    with suspend_guard(), our_merge(), seat:  # the preflight has checked it
        run_merge(config.model_copy(deep=True), str(output), options, text)
    write_text(output / "mergekit_config.yml", text)
    write_text(output / "README.md", written)


def _host_options(
    config: MergeConfiguration, models: list[InputModel], options: MergeOptions
) -> MergeOptions:
    """Leave to the host only what it can do: its card asks the network and follows hash order."""
    update = {"write_model_card": False}
    donor = _donor(config, models)
    if options.copy_tokenizer and not any((donor.folder / name).exists() for name in TOKENIZERS):
        LOG.warning("%s has no tokenizer, so none is written", donor.reference)
        update["copy_tokenizer"] = False
    return options.model_copy(update=update)


def _donor(config: MergeConfiguration, models: list[InputModel]) -> InputModel:
    """Return the model from which the host takes the configuration and the tokenizer."""
    donor = str(_base(config).model)
    return next(model for model in models if model.reference == donor)


def _base(config: MergeConfiguration) -> ModelReference:
    return config.base_model or config.referenced_models()[0]


def _is_sliced(config: MergeConfiguration) -> bool:
    modules = (config.modules or {}).values()
    return bool(config.slices or any(module.slices for module in modules))
