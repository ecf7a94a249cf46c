"""Full copies of ``base+adapter`` for the host, made by PEFT after every name has been checked.

The host makes such copies itself, but keeps silent about tensors that fill nothing, takes half a
copy for a whole one, and cannot help an adapter whose names lack a prefix.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.config import PLAIN_STARTS, AdapterConfig, read_settings
from mergekit_stf.host.adapters.names import KnownWeights, describe_renaming, misfit_error, resolve
from mergekit_stf.host.adapters.peft import Placing, build_hollow_base, peft_errors, place
from mergekit_stf.host.adapters.read import CONFIG_FILE, WEIGHTS_FILE, read_tensors, weight_of
from mergekit_stf.host.adapters.rewrite import SPECIAL, Rewriter
from mergekit_stf.host.architectures.loading import ParameterNames
from mergekit_stf.host.checkpoints.files import sha256_of
from mergekit_stf.host.checkpoints.inputs import locate
from mergekit_stf.host.compat import close_checkpoints, keep_open
from mergekit_stf.host.recipe.yaml_text import first_line
from mergekit_stf.text import printable

LOG = logging.getLogger(__name__)


def copy_adapters(config: MergeConfiguration, options: MergeOptions, folder: Path) -> None:
    """Make a full copy for every ``base+adapter`` of a recipe, which the host then finds.

    Args:
        config: the recipe.
        options: the host's.
        folder: where the copies go; one that is there from an earlier run is used again.

    Raises:
        STFError: a tensor of an adapter fills nothing in its base.
    """
    close_checkpoints()
    for reference in _with_adapters(config.referenced_models()):
        with tempfile.TemporaryDirectory() as scratch:
            files = _prepare(reference, options, Path(scratch))
            path = ModelPath(path=str(_make_copy(reference, files, options, folder)))
        copy = ModelReference(model=path)
        keep_open(reference, copy.lazy_loader(lazy_unpickle=options.lazy_unpickle))


def plan_adapters_as_bases(config: MergeConfiguration, options: MergeOptions) -> None:
    """Check the adapters of a recipe, and let the host plan them: a copy has the base's tensors.

    Raises:
        STFError: as `copy_adapters`.
    """
    close_checkpoints()
    for reference in _with_adapters(config.referenced_models()):
        with tempfile.TemporaryDirectory() as scratch:
            _prepare(reference, options, Path(scratch))
        base = _base_of(reference)
        loader = base.lazy_loader(options.transformers_cache, options.lazy_unpickle)
        keep_open(reference, loader)


def check_copies(references: Iterable[ModelReference], options: MergeOptions) -> None:
    """Refuse adapters of which the host's own copies lack something.

    Raises:
        STFError: with the adapter, the names and the command that merges it.
    """
    for reference in _with_adapters(references):
        folder = locate(reference.lora, options.transformers_cache)
        settings = read_settings(folder / CONFIG_FILE)
        placing = place(
            reference, folder, build_hollow_base(_base_of(reference), options.trust_remote_code)
        )
        if not placing.unplaced and not _starts_at_random(placing, settings):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            _prepare(reference, options, Path(scratch))
        names = sorted({weight_of(name) for name in placing.unplaced or placing.started})
        raise STFError(
            f"{reference}: the copy that mergekit has made with PEFT lacks {', '.join(names[:3])}"
            f"{' and others' if names[3:] else ''}, because the adapter's names are not the "
            "base's; merge with mergekit-stf merge or mergekit-stf lora, which put them right"
        )


def _with_adapters(references: Iterable[ModelReference]) -> Iterator[ModelReference]:
    yield from dict.fromkeys(r for r in references if r.lora is not None)


def _base_of(reference: ModelReference) -> ModelReference:
    return reference.model_copy(update={"lora": None})


def _prepare(reference: ModelReference, options: MergeOptions, scratch: Path) -> Path:
    """Return the folder of an adapter all of whose tensors PEFT will put into the base."""
    folder = locate(reference.lora, options.transformers_cache)
    settings = read_settings(folder / CONFIG_FILE)
    model = build_hollow_base(_base_of(reference), options.trust_remote_code)
    files = folder
    if _is_plain(settings) and (folder / WEIGHTS_FILE).is_file():
        rewriter = Rewriter(folder, settings, read_tensors(folder))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        known = KnownWeights(shapes, {name: name for name in shapes}, ParameterNames(model))
        names = resolve(rewriter.shapes, known)
        if names is not None:
            files = scratch
            rewriter.write(names, scratch)
        if names:
            LOG.warning(
                "%s: its names are not the base's: %s", reference.lora, describe_renaming(names)
            )
    placing = place(reference, files, model)
    if placing.unplaced:
        raise _refusal(reference, placing, settings)
    if _starts_at_random(placing, settings):
        raise STFError(
            f"{reference}: {folder / CONFIG_FILE} names modules of which the adapter stores "
            f"nothing, {', '.join(placing.started[:3])}, and starts them at random; correct its "
            "target_modules"
        )
    return files


def _is_plain(settings: AdapterConfig) -> bool:
    extra = settings.model_extra or {}
    return settings.peft_type == "LORA" and not any(extra.get(key) for key in SPECIAL)


def _starts_at_random(placing: Placing, settings: AdapterConfig) -> bool:
    """Say whether PEFT would merge random numbers; it starts most adapters at zero."""
    return bool(placing.started) and settings.init_lora_weights not in PLAIN_STARTS - {False}


def _refusal(reference: ModelReference, placing: Placing, settings: AdapterConfig) -> STFError:
    names = sorted({weight_of(name) for name in placing.unplaced})
    rows = {weight_of(n): t.shape[0] for n, t in placing.stored.items() if t.ndim == 2}
    base = str(_base_of(reference))
    return misfit_error(str(reference.lora), base, names, settings.task_type, rows.get(names[0]))


def _make_copy(reference: ModelReference, files: Path, options: MergeOptions, folder: Path) -> Path:
    """Return the full copy of a base and an adapter, from an earlier run if it is whole."""
    base = _base_of(reference)
    parts = [str(base), str(base.override_architecture), str(options.lora_merge_dtype)]
    parts += [sha256_of(path) for path in sorted(files.glob("adapter_*"))]
    out = folder / f"copy-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}"
    if out.exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished, peft_errors(reference):
        prepared = reference.model_copy(update={"lora": ModelPath(path=str(files))})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            copy = prepared.merged(unfinished, options.trust_remote_code, options.lora_merge_dtype)
        shutil.move(copy.model.path, out)
    _repeat(reference, said)
    return out


def _repeat(reference: ModelReference, said: Iterable[warnings.WarningMessage]) -> None:
    """Say PEFT's warnings in one line each, once."""
    peft = [w for w in said if w.category is UserWarning and "peft" in Path(w.filename).parts]
    for line in dict.fromkeys(printable(first_line(warning.message)) for warning in peft):
        LOG.warning("%s: PEFT says: %s", reference.lora, line)
