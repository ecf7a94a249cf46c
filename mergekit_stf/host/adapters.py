"""LoRA adapters in PEFT's format: low-rank updates and replaced weights, read without PEFT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelPath
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.core.lowrank import LowRank
from mergekit_stf.host.adapter_config import AdapterConfig, read_config
from mergekit_stf.host.inputs import locate
from mergekit_stf.host.tasks import check_finite

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(?:\.weight)?")
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
    for key, tensor in _tensors(folder).items():
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
    updates = {
        f"{module}.weight": _update(parts, config, module, str(folder))
        for module, parts in factors.items()
    }
    return Adapter(str(path), config, updates, replaced)


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        hint = ""
        if (folder / PICKLED_FILE).exists():
            hint = f"; {PICKLED_FILE} is a pickle, save the adapter again as safetensors with PEFT"
        raise STFError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    try:
        with safe_open(file, framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise STFError(f"{file}: not a safetensors file: {error}") from error


def _update(parts: dict[str, Tensor], config: AdapterConfig, module: str, where: str) -> Update:
    embedding = "embedding_A" in parts
    kinds = ("embedding_B", "embedding_A") if embedding else ("B", "A")
    if set(parts) != set(kinds):
        raise STFError(f"{where}: {module} has the factors {sorted(parts)}, needs {sorted(kinds)}")
    B, A = (parts[kind] for kind in kinds)
    if B.dim() != 2 or A.dim() != 2:
        shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
        raise STFError(f"{where}: {module}: factors {shapes}, only linear layers can be merged")
    try:
        rank, scale = config.rank(module), config.scale(module)
    except TimeoutError as error:
        raise STFError(
            f"{where}: matching {module} with a regular expression of rank_pattern or "
            f"alpha_pattern takes too long; name the modules more plainly in {CONFIG_FILE}"
        ) from error
    if not B.shape[1] == A.shape[0] == rank:
        found = f"B {tuple(B.shape)}, A {tuple(A.shape)}"
        raise STFError(f"{where}: {module}: {found}, but {CONFIG_FILE} says rank {rank}")
    return Update(LowRank(B.double() * scale, A.double()), embedding)
