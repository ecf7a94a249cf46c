"""Which weights of a base an adapter means: its names, those of the base, and a prefix between.

A text model that became a part of a multimodal one has its weights under a longer name there:
``model.layers.0...`` is ``model.language_model.layers.0...`` or
``language_model.model.layers.0...``. An adapter of the one fits the other, once its names do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.architectures.loading import ParameterNames

Shape = tuple[int, ...]

HEADS: Mapping[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""The classes whose heads PEFT stores with an adapter of a ``task_type``."""


@dataclass(frozen=True)
class KnownWeights:
    """The weights of a base.

    Attributes:
        shapes: by name; one weight may have several names.
        weights: for each name what tells its weight from others.
        loader: what transformers makes of other names, None where it has no class for the model.
    """

    shapes: Mapping[str, Shape]
    weights: Mapping[str, str]
    loader: ParameterNames | None


def resolve(wanted: Mapping[str, Shape], known: KnownWeights) -> dict[str, str] | None:
    """Find the weights that an adapter means by names that the base has not.

    First by the rules with which transformers renames the weights of older checkpoints, then by
    exchanging one prefix. A prefix holds no number of a layer, leads every unknown name to a weight
    of a fitting shape, and is the only one that leads there.

    Args:
        wanted: names and shapes of the adapter's weights; factors may be transposed.
        known: the base's.

    Returns:
        The base's name for every unknown one; None where there is no way, or more than one.
    """
    unknown = [name for name in wanted if name not in known.shapes]
    if not unknown:
        return {}
    if known.loader is not None and any(name in known.loader for name in unknown):
        return None  # a parameter without a weight of its own: tied, or a part of a stack
    found = [m for m in _by_transformers(unknown, known) if _fits(m, wanted, known)]
    if not found:
        kept = [name for name in wanted if name in known.shapes]
        changes = (
            _exchange_prefix(unknown, kept, *change) for change in _prefixes(unknown[0], known)
        )
        found = [names for names in changes if names and _fits(names, wanted, known)]
    targets = {tuple(known.weights[name] for name in names.values()) for names in found}
    return found[0] if len(targets) == 1 else None


def describe_renaming(names: Mapping[str, str]) -> str:
    """Say in a few words what became of the names."""
    old, new = next(iter(names.items()))
    return f"{old} is {new} (and {len(names) - 1} more)" if len(names) > 1 else f"{old} is {new}"


def misfit_error(
    adapter: str, base: str, unplaced: Sequence[str], task_type: str | None, labels: int | None
) -> STFError:
    """Return the error for an adapter whose tensors fill nothing in the base.

    Args:
        adapter: its reference.
        base: the base's reference.
        unplaced: the names for which the base has no place.
        task_type: as its configuration says.
        labels: rows of the first one, None where it is no matrix.
    """
    some = ", ".join(unplaced[:3]) + (f" and {len(unplaced) - 3} more" if unplaced[3:] else "")
    head = HEADS.get(task_type or "")
    if head is None or any(re.search(r"\.\d+\.", name) for name in unplaced):
        remedy = "it belongs to another base or has a head of its own; name the base it was made on"
    else:
        size = f", num_labels={labels}" if labels else ""
        remedy = (
            "it was trained with a head of its own; give as base_model a model that has one: "
            f"transformers.{head}.from_pretrained({base!r}{size}).save_pretrained(DIR)"
        )
    return STFError(
        f"{adapter} changes {some}: the base {base} has no weight of that name; {remedy}"
    )


def _by_transformers(unknown: Sequence[str], known: KnownWeights) -> Iterator[dict[str, str]]:
    if known.loader is None:
        return
    targets = {name: known.loader.of(name) for name in unknown}
    if all(len(found) == 1 for found in targets.values()):
        yield {name: next(iter(found)) for name, found in targets.items()}


def _prefixes(name: str, known: KnownWeights) -> list[tuple[str, str]]:
    """Return the prefixes of a name and what takes their place in names with the same end."""
    parts = name.split(".")
    found: dict[tuple[str, str], None] = {}
    for other in known.shapes:
        others = other.split(".")
        same = _common(parts, others)
        old, new = parts[: len(parts) - same], others[: len(others) - same]
        if same and not any(part.isdigit() for part in (*old, *new)):
            found[".".join(old), ".".join(new)] = None
    return list(found)


def _common(parts: Sequence[str], others: Sequence[str]) -> int:
    """Count the components at the end that two names share."""
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(parts), len(others)))


def _exchange_prefix(
    unknown: Sequence[str], kept: Collection[str], old: str, new: str
) -> dict[str, str] | None:
    """Return every name with another prefix, None where the prefix is not that of all."""
    start = f"{old}." if old else ""
    if not all(name.startswith(start) for name in unknown):
        return None
    if start and any(name.startswith(start) for name in kept):
        return None
    start_new = f"{new}." if new else ""
    return {name: start_new + name.removeprefix(start) for name in unknown}


def _fits(names: Mapping[str, str], wanted: Mapping[str, Shape], known: KnownWeights) -> bool:
    taken = {known.weights[name] for name in wanted if name in known.shapes}
    return all(
        new in known.shapes
        and wanted[old] in (known.shapes[new], known.shapes[new][::-1])
        and known.weights[new] not in taken
        for old, new in names.items()
    )
