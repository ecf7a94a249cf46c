"""LoRA adapters in PEFT's format: low-rank updates and replaced weights, read without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from mergekit.common import ModelPath
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.low_rank import LowRank
from mergekit_stf.host.adapters.config import AdapterConfig, read_config
from mergekit_stf.host.checkpoints.inputs import locate
from mergekit_stf.host.merging.finite import check_finite

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

TYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(?:\.weight)?")
_TAG = re.compile(r"(.+?)\.(?:lora_|token_adapter\.)")
_WRAPPER = re.compile(r"\.(base_layer|original_module|modules_to_save)(?=\.)")


@dataclass(frozen=True)
class Update:
    """The low-rank update of one module, as PEFT stores it.

    Attributes:
        factors: ``scale * B`` (out, r) and ``A`` (r, in), in float64.
        embedding: the module is an embedding, whose weight is (in, out).
    """

    factors: LowRank
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """What one adapter does to its base.

    Attributes:
        source: where it came from, for messages.
        config: the settings that decide its value.
        updates: low-rank updates by the name of the weight.
        replaced: whole weights that it stores (``modules_to_save``, ``bias``), by name.
    """

    source: str
    config: AdapterConfig
    updates: dict[str, Update]
    replaced: dict[str, Tensor]

    @property
    def weights(self) -> set[str]:
        """Names of the weights that it touches."""
        return {*self.updates, *self.replaced}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that it touches; a factored one may be stored transposed."""
        updates = {name: update.factors.shape for name, update in self.updates.items()}
        return {**updates, **{name: tuple(t.shape) for name, t in self.replaced.items()}}

    def rename(self, names: Mapping[str, str]) -> Adapter:
        """Return the adapter with some of its weights under other names."""
        return replace(
            self,
            updates={names.get(name, name): update for name, update in self.updates.items()},
            replaced={names.get(name, name): tensor for name, tensor in self.replaced.items()},
        )


def read_adapter(path: ModelPath, cache_dir: str | None = None) -> Adapter:
    """Read an adapter from a directory or from the hub.

    Args:
        path: a local directory or a repository, with its revision.
        cache_dir: where a repository is downloaded to; the hub's own cache by default.

    Raises:
        STFError: not an adapter that can be merged; the message says what to do.
    """
    folder = locate(path, cache_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise STFError(f"{path} is no adapter: it has no {CONFIG_FILE}")
    config = read_config(folder / CONFIG_FILE)
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder).items():
        if not key.startswith(PREFIX):
            raise STFError(f"{folder}: {key}: not a name of PEFT, which start with {PREFIX!r}")
        name = key.removeprefix(PREFIX)
        check_finite(name, [(str(folder), tensor)])
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["module"], {})[match["kind"]] = tensor
        elif ".lora_" in name:
            raise STFError(f"{folder}: {key}: a kind of LoRA that is not known here")
        else:
            replaced[_WRAPPER.sub("", name)] = tensor
    settings = settings_of(config, factors, folder)
    updates = {
        f"{module}.weight": _update(
            parts, settings[module][0], config.scale(*settings[module]), module, str(folder)
        )
        for module, parts in factors.items()
    }
    return Adapter(str(path), config, updates, replaced)


def weight_of(name: str) -> str:
    """Return the weight that a tensor of an adapter changes, from its name without PREFIX."""
    match = _TAG.match(name)
    return _WRAPPER.sub("", f"{match[1]}.weight" if match else name)


def settings_of(
    config: AdapterConfig, modules: Iterable[str], folder: Path
) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each module.

    Raises:
        STFError: a pattern of the configuration takes too long.
    """
    try:
        return config.settings(modules)
    except TimeoutError as error:
        raise STFError(
            f"{folder}: matching its modules with the regular expressions of rank_pattern and "
            f"alpha_pattern takes too long; name the modules more plainly in {CONFIG_FILE}"
        ) from error


def check_size(B: Tensor, A: Tensor, scale: float, module: str, where: str) -> None:
    """Refuse an update that no weight can take.

    Raises:
        STFError: with the adapter and the module.
    """
    norm = abs(scale) * LowRank(B.double(), A.double()).norm
    if not norm <= torch.finfo(torch.float32).max:
        raise STFError(
            f"{where}: {module}: its update, {scale:.3g} B A, has a norm of {norm:.3g}, more than "
            f"float32 holds; correct lora_alpha and alpha_pattern in {CONFIG_FILE}"
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read what an adapter stores, by its names there.

    Raises:
        STFError: there is no safetensors file, or it holds numbers that are no weights.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        hint = ""
        if (folder / PICKLED_FILE).exists():
            hint = f"; {PICKLED_FILE} is a pickle, save the adapter again as safetensors with PEFT"
        raise STFError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise STFError(f"{file}: not a safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            raise STFError(
                f"{file}: {key} is stored as {tensor.dtype}; adapters are merged in float64, "
                "float32, float16 and bfloat16, so save it again in one of these"
            )
    return tensors


def _update(parts: dict[str, Tensor], rank: int, scale: float, module: str, where: str) -> Update:
    embedding = "embedding_A" in parts
    kinds = ("embedding_B", "embedding_A") if embedding else ("B", "A")
    if set(parts) != set(kinds):
        raise STFError(f"{where}: {module} has the factors {sorted(parts)}, needs {sorted(kinds)}")
    B, A = (parts[kind] for kind in kinds)
    if B.dim() != 2 or A.dim() != 2:
        shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
        raise STFError(f"{where}: {module}: factors {shapes}, only linear layers can be merged")
    if not B.shape[1] == A.shape[0] == rank:
        found = f"B {tuple(B.shape)}, A {tuple(A.shape)}"
        raise STFError(f"{where}: {module}: {found}, but {CONFIG_FILE} says rank {rank}")
    check_size(B, A, scale, module, where)
    return Update(LowRank(B.double() * scale, A.double()), embedding)
