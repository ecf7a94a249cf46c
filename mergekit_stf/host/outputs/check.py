"""One check of every output: complete, finite, and as its configuration says.

What a checkpoint must hold is asked of its class: the model is built without memory, and
transformers' own rules say which parameter each stored name fills. What the base lacks itself
cannot be asked of the merge; it is told, not refused.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, PretrainedConfig

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures.coverage import ALLOW_LOSS
from mergekit_stf.host.architectures.loading import ParameterNames, parameter_names
from mergekit_stf.host.architectures.names import collapse_layers, kind_of
from mergekit_stf.host.checkpoints.content import same_bits
from mergekit_stf.host.checkpoints.counts import check_counts
from mergekit_stf.host.checkpoints.headers import stored_header
from mergekit_stf.host.diagnostics.notices import say_once
from mergekit_stf.host.merging.finite import is_finite
from mergekit_stf.host.outputs.written import Written
from mergekit_stf.host.recipe.yaml_text import first_line
from mergekit_stf.text import printable

LOG = logging.getLogger(__name__)


class OutputCheck(BaseModel):
    """What the check of an output found.

    Attributes:
        model_class: the class that the configuration names.
        tensors: how many are written.
        parameters: how many parameters of the class they fill, None where transformers cannot
            build it.
        unfilled: what is amiss with parameters in the base and therefore in the output too, by
            the parameter.
        left_out: kinds of tensors of the base that are not written, by the reason.
        infinite: tensors whose infinite entries are those of the base, such as attention masks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_class: str | None
    tensors: int
    parameters: int | None
    unfilled: dict[str, str] = {}
    left_out: dict[str, str] = {}
    infinite: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line that says what holds."""
        filled = f"{self.tensors} tensors"
        if self.parameters is not None:
            filled += f" fill {self.parameters} parameters of {self.model_class}"
        masks = (
            f", but for {collapse_layers(self.infinite)}, as in the base" if self.infinite else ""
        )
        return f"{filled}, and all values are finite{masks}"

    def notices(self) -> Iterator[str]:
        """Yield one line for each thing that a user should know."""
        if self.parameters is None:
            yield f"transformers cannot build {self.model_class}; its parameters were not listed"
        if self.unfilled:
            first = next(iter(self.unfilled.values()))
            yield (
                f"the merged model is as incomplete as the base: {first} "
                f"({len(self.unfilled)} such parameters); transformers makes up what is missing"
            )
        for reason, kinds in self.left_out.items():
            yield f"not written, because {reason}: {kinds}"


def check_output(
    folder: Path,
    model: ModelReference,
    sliced: bool = False,
    infinite: Sequence[str] | None = None,
) -> OutputCheck:
    """Check a merged model before it is published.

    Args:
        folder: where it is written.
        model: the base, from which the configuration comes.
        sliced: whether the recipe takes some layers and leaves others out.
        infinite: the tensors with infinite entries, where all values were looked at while they
            were written; None to look at them now.

    Raises:
        STFError: a parameter that the base fills is not filled, a tensor of the base is lost, an
            entry is not finite, or a shape is not what the configuration says.
    """
    written = Written(folder)
    base = _Base(model)
    names = names_of(folder, len(written.shapes))
    faults = faults_of(names, written.shapes)
    known = faults_of(base.names, base.shapes)
    left_out, lost = _left_out(base, written.shapes, names, sliced)
    _refuse([*(fault for name, fault in faults.items() if name not in known), *lost])
    if infinite is None:
        infinite = not_finite(written)
        _check_infinite(infinite, base, names)
    return OutputCheck(
        model_class=_model_class(folder),
        tensors=len(written.shapes),
        parameters=None if names is None else len(names.parameters_to_fill() - faults.keys()),
        unfilled=faults,
        left_out={reason: collapse_layers(left) for reason, left in left_out.items()},
        infinite=tuple(sorted(infinite)),
    )


def value_faults(folder: Path, known: Collection[str] = ()) -> Iterator[str]:
    """Read a finished output and yield a line for each tensor that is not finite.

    Args:
        folder: a merged model or adapter.
        known: tensors that may hold infinite entries.

    Raises:
        STFError: the weights cannot be read.
    """
    for name in not_finite(Written(folder)):
        if name not in known:
            yield f"{name} has entries that are NaN or infinite"


def structure_faults(folder: Path, known: Collection[str] = ()) -> Iterator[str]:
    """Yield a line for each parameter of a finished model that transformers could not load.

    Args:
        folder: a merged model.
        known: parameters that the base lacks too.

    Raises:
        STFError: the weights cannot be read.
    """
    shapes = Written(folder).shapes
    faults = faults_of(names_of(folder, len(shapes)), shapes)
    yield from (fault for name, fault in faults.items() if name not in known)


def not_finite(written: Written) -> list[str]:
    """Read all weights and return the names of those with NaN or infinite entries."""
    return [name for name, tensor in written.tensors() if not is_finite(tensor)]


def faults_of(
    names: ParameterNames | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return, for each parameter that cannot be loaded from these tensors, what is wrong."""
    if names is None:
        return {}
    filled = {parameter for name in shapes for parameter in names.of(name)}
    faults = {
        name: f"no tensor fills {name}" for name in sorted(names.parameters_to_fill() - filled)
    }
    for name, shape in shapes.items():
        wanted = names.shape_of(name)
        if wanted is not None and wanted != shape:
            faults[name] = f"{name} is {shape}, and the configuration asks for {wanted}"
    return faults


class _Base:
    """What the base stores, and what its class makes of that."""

    def __init__(self, model: ModelReference) -> None:
        cache = LoaderCache()
        self.loader = cache.get(model)
        stored = self.loader.index.tensor_paths
        self.shapes = {name: stored_header(self.loader, name).shape for name in stored}
        self.names = _build(model.config(cache.trust_remote_code), len(self.shapes))

    def unties(self, name: str) -> bool:
        """Say whether a tensor is a tied parameter's and holds other values than its source's."""
        names = self.names
        source = names.ties.get(names.parameter(name) or "") if names else None
        sources = [other for other in self.shapes if names and names.parameter(other) == source]
        tensors = [self.loader.get_tensor(one) for one in (name, *sources[:1]) if source]
        return len(tensors) == 2 and not same_bits(*tensors)

    def is_infinite(self, name: str) -> bool:
        """Say whether a tensor holds infinite entries and no NaN."""
        tensor = self.loader.get_tensor(name, raise_on_missing=False)
        return tensor is not None and not is_finite(tensor) and not bool(tensor.isnan().any())


def _left_out(
    base: _Base, written: Mapping[str, object], names: ParameterNames | None, sliced: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the base's tensors that have no place in the output, by reason, and the lost ones."""
    kinds = {kind_of(name) for name in written}
    filled = {parameter for name in written for parameter in names.of(name)} if names else set()
    reasons: dict[str, list[str]] = {}
    lost = []
    for name in sorted(base.shapes.keys() - written.keys()):
        targets = names.of(name) if names else set()
        if sliced and not targets and kind_of(name) in kinds:
            reasons.setdefault("the recipe's slices leave out their layers", []).append(name)
        elif names is None:
            reasons.setdefault("mergekit's table does not name them", []).append(name)
        elif not targets:
            reasons.setdefault("the model's class has no use for them", []).append(name)
        elif not targets <= filled or base.unties(name):
            lost.append(f"{name} of the base is neither written nor merged into another tensor")
    return reasons, lost


def _refuse(problems: Sequence[str]) -> None:
    if not problems:
        return
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    message = f"the output would be incomplete: {problems[0]}{more}"
    if os.environ.get(ALLOW_LOSS) != "1":
        raise STFError(f"{message}; set {ALLOW_LOSS}=1 to publish it all the same")
    LOG.warning("%s", message)


def _check_infinite(infinite: Sequence[str], base: _Base, names: ParameterNames | None) -> None:
    """Accept infinite entries only where the base has them and they are no parameters."""
    for name in infinite:
        if (names and names.fills_parameter(name)) or not base.is_infinite(name):
            raise STFError(
                f"{name}: the output has entries that are NaN or infinite, so it is not published; "
                "write `out_dtype: bfloat16`, or lower `weight` or `lambda`"
            )


def _model_class(folder: Path) -> str | None:
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    return str(named[0]) if named else None


def names_of(folder: Path, tensors: int) -> ParameterNames | None:
    """Return what the class of an output makes of names; no code of a model's own is run."""
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a file may make transformers raise anything
        _say(f"{folder / 'config.json'}: {printable(first_line(error))}")
        return None
    return _build(settings, tensors)


def _build(settings: PretrainedConfig, tensors: int) -> ParameterNames | None:
    """Build the class of a configuration without memory, or say why that cannot be done."""
    try:
        check_counts(settings.to_dict(), Path(settings.name_or_path), tensors)
        return parameter_names(settings)
    except Exception as error:  # a class may ask for any package or value
        _say(f"{settings.architectures} cannot be built: {printable(first_line(error))}")
        return None


def _say(reason: str) -> None:
    say_once(f"{reason}; what a checkpoint must hold is therefore not known")
