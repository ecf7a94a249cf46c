"""What a sample of the weights says about the models of a recipe, before they are merged."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from mergekit.common import ModelReference
from pydantic import BaseModel

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.diagnostics.notices import NEAR_DUPLICATE
from mergekit_stf.host.planning.planned import PlannedWeight

NORM_SPREAD = 3.0
MOSTLY_ZERO = 0.9
LOST = 0.01
RELATED = 0.5
"""Least cosine between a model's linear maps and its base's: near 1 for what was tuned from it
(0.998 for the demo's specialists), near 0 for what was trained on its own."""


class ModelProbe(BaseModel):
    """What the sample says about one tuned model.

    Attributes:
        model: as the recipe names it.
        norm: length of its task vector ``w (P - P0)``, over the sample.
        zeros: share of entries that do not differ from the base.
        lost: ``‖τ' - τ‖ / ‖τ‖``, where τ' is what the recipe's ``dtype`` leaves of the task
            vector τ; 0 where nothing is rounded.
        cosine: between P and P0, over the sample.
    """

    model: str
    norm: float
    zeros: float
    lost: float
    cosine: float


class PairProbe(BaseModel):
    """The median cosine between the task vectors of two models, weight by weight."""

    models: tuple[str, str]
    cosine: float


class Probe(BaseModel):
    """What a sample of the weights says.

    Attributes:
        sampled: number of weights that were read.
        models: each tuned model.
        pairs: each two of them.
        warnings: what deserves a look before the merge.
    """

    sampled: int
    models: list[ModelProbe]
    pairs: list[PairProbe]
    warnings: list[str]


class _Sums:
    """Sums over the sampled weights, of each model and each pair."""

    def __init__(self, count: int) -> None:
        self.entries = 0
        self.squares = [0.0] * count
        self.zeros = [0] * count
        self.errors = [0.0] * count
        self.exact = [0.0] * count
        self.base = 0.0
        self.tuned = [0.0] * count
        self.products = [0.0] * count
        self.cosines: dict[tuple[int, int], list[float]] = {
            pair: [] for pair in combinations(range(count), 2)
        }

    def add(self, weight: PlannedWeight) -> None:
        """Read one weight of every model."""
        found = [_stored(weight, model) for model in (weight.base, *weight.models)]
        stored = [tensor for tensor in found if tensor is not None]
        if len(stored) < len(found):
            return  # an optional weight that not every model has
        base = stored[0]
        rounded = base.to(weight.dtype).double()
        self.base += float(base.double().square().sum())
        flat = []
        for index, (tuned, scale) in enumerate(zip(stored[1:], weight.weight, strict=True)):
            delta = (tuned.to(weight.dtype).double() - rounded).flatten()
            exact = (tuned.double() - base.double()).flatten()
            self.squares[index] += float(scale**2 * delta.square().sum())
            self.zeros[index] += int((delta == 0).sum())
            self.errors[index] += float((delta - exact).square().sum())
            self.exact[index] += float(exact.square().sum())
            self.tuned[index] += float(tuned.double().square().sum())
            self.products[index] += float((tuned.double() * base.double()).sum())
            flat.append(delta * scale)
        self.entries += base.numel()
        for (i, j), cosines in self.cosines.items():
            length = flat[i].norm() * flat[j].norm()
            if length > 0:
                cosines.append(float(flat[i] @ flat[j] / length))

    def model(self, index: int, label: str) -> ModelProbe:
        """Return what the sums say about one model."""
        lengths = (self.base * self.tuned[index]) ** 0.5
        return ModelProbe(
            model=label,
            norm=self.squares[index] ** 0.5,
            zeros=self.zeros[index] / max(1, self.entries),
            lost=(self.errors[index] / self.exact[index]) ** 0.5 if self.exact[index] else 0.0,
            cosine=self.products[index] / lengths if lengths else 0.0,
        )


def probe_models(weights: Sequence[PlannedWeight]) -> Probe:
    """Read these weights, one at a time, and compare the models.

    Raises:
        STFError: there is no weight, or the weights are not all of the same models.
    """
    if not weights or len({weight.models for weight in weights}) > 1:
        raise STFError("--probe needs a recipe that merges the same models in every layer")
    labels = [str(model) for model in weights[0].models]
    sums = _Sums(len(labels))
    for weight in weights:
        sums.add(weight)
    models = [sums.model(index, label) for index, label in enumerate(labels)]
    pairs = [
        PairProbe(models=(labels[i], labels[j]), cosine=statistics.median(cosines))
        for (i, j), cosines in sums.cosines.items()
        if cosines
    ]
    warnings = [*_model_warnings(models, weights[0]), *_pair_warnings(pairs)]
    return Probe(sampled=len(weights), models=models, pairs=pairs, warnings=warnings)


def _stored(weight: PlannedWeight, model: ModelReference) -> torch.Tensor | None:
    load = weight.loads[model].model_copy(update={"dtype": None})
    tensor: torch.Tensor | None = load.execute()
    return tensor


def _pair_warnings(pairs: Sequence[PairProbe]) -> Iterator[str]:
    for pair in pairs:
        if abs(pair.cosine) > NEAR_DUPLICATE:
            first, second = pair.models
            yield (
                f"{first} and {second} are near-duplicates (cosine {pair.cosine:.3f}): "
                "leave one of them out"
            )


def _model_warnings(models: Sequence[ModelProbe], weight: PlannedWeight) -> Iterator[str]:
    for model in models:
        if model.norm == 0:
            yield f"{model.model} does not differ from the base in the sample: check its path"
        elif model.zeros > MOSTLY_ZERO:
            yield (
                f"{model.model}: {model.zeros:.0%} of the entries do not differ from the base; "
                "was it saved in a type that lost its changes?"
            )
        elif model.cosine < RELATED:
            yield (
                f"{model.model} has little in common with the base (cosine {model.cosine:.2f}, of "
                "tuned models near 1): merge models that were tuned from this base"
            )
        if model.lost > LOST:
            name = str(weight.dtype).removeprefix("torch.")
            yield (
                f"{model.model}: dtype {name} rounds off {model.lost:.1%} of its changes; "
                "leave dtype out, and set out_dtype for the output"
            )
    lengths = sorted((model.norm, model.model) for model in models if model.norm > 0)
    if lengths and lengths[-1][0] > NORM_SPREAD * lengths[0][0]:
        (small, quiet), (large, loud) = lengths[0], lengths[-1]
        yield (
            f"{loud} changed the base {large / small:.1f} × as much as {quiet} and will "
            "dominate: give it a smaller weight"
        )
