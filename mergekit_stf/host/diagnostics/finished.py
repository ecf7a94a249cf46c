"""A merge that is done: its recipe, its options, its records, its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints.files import read_text
from mergekit_stf.host.checkpoints.inputs import input_models
from mergekit_stf.host.checkpoints.weight_files import weight_files
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.outputs.check import structure_faults, value_faults
from mergekit_stf.host.planning.planned import PlannedWeight, plan_weights
from mergekit_stf.host.provenance import lock
from mergekit_stf.host.recipe.recipe import check_recipe

HOST_RECIPE = "mergekit_config.yml"


class Finished:
    """The folder of a finished merge.

    Args:
        folder: that ``mergekit-stf merge`` or ``mergekit-yaml`` wrote.

    Raises:
        STFError: the folder holds no merged model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        weight_files(folder)
        self._loader = LazyTensorLoader.from_disk(str(folder))
        locked = (folder / lock.FILE_NAME).exists()
        self._lock = lock.read_lock(folder) if locked else None

    @property
    def name(self) -> str:
        """The name of the merged model."""
        return self.folder.resolve().name

    @property
    def text(self) -> str:
        """The recipe, from the lock file or from the host's copy of it.

        Raises:
            STFError: there is neither.
        """
        if self._lock is not None:
            return self._lock.recipe
        path = self.folder / HOST_RECIPE
        if not path.exists():
            raise STFError(f"{self.folder} has neither {lock.FILE_NAME} nor {HOST_RECIPE}")
        return read_text(path)

    def output_check(self) -> tuple[str, list[str]]:
        """Return what the check of the output found: one line on what holds, and what does not.

        A merge without a check in its lock, as one by ``mergekit-yaml``, is looked at now.
        """
        if self._lock is not None and self._lock.check is not None:
            return self._lock.check.summary, [*self._lock.check.notices()]
        faults = [*value_faults(self.folder), *structure_faults(self.folder)]
        return "" if faults else "all parameters are filled and all values are finite", faults

    def weights(self) -> list[PlannedWeight]:
        """Plan the merge again.

        No code from a model's folder is run, whatever the lock says.

        Raises:
            STFError: a model of the recipe cannot be found any more, or is an adapter.
        """
        made = self._lock
        options = MergeOptions() if made is None else made.options.restore(None, False)
        config = check_recipe(self.text, f"recipe of {self.folder}").config
        if any(model.lora is not None for model in config.referenced_models()):
            raise STFError(
                f"{self.folder} is a merge of adapters, and preservation is measured on full "
                "models; say --sample 0 to leave it out"
            )
        input_models(config, options)
        return plan_weights(config, options)

    def records(self, path: Path | None = None) -> list[diagnostics.Record]:
        """Return the records of the merge, from ``path`` if they were written elsewhere.

        Raises:
            STFError: there are none.
        """
        path = path or self.folder / diagnostics.FILE_NAME
        if not path.exists():
            raise STFError(
                f"{path} is missing: merge with mergekit-stf merge, or set "
                f"{diagnostics.VARIABLE}=FILE for mergekit-yaml and give --diagnostics FILE"
            )
        return diagnostics.read_records(path)

    def weight(self, name: str) -> torch.Tensor | None:
        """Return a weight as it was written, None where the output has no such weight."""
        tensor: torch.Tensor | None = self._loader.get_tensor(name, raise_on_missing=False)
        return tensor
