"""An adapter written again for PEFT, with the base's names and without regular expressions.

PEFT finds an adapter's modules by its configuration, not by the names in its file. A module that
the configuration matches beyond those starts as if for training, and a pattern may take forever.
Here every module is named in full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.config import AdapterConfig
from mergekit_stf.host.adapters.names import Shape
from mergekit_stf.host.adapters.read import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    check_size,
    settings_of,
    weight_of,
)

FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
SPECIAL = ("target_parameters", "layer_replication", "trainable_token_indices", "megatron_config")
"""Settings that name more than modules with factors; such adapters stay as they are."""


class Rewriter:
    """A LoRA adapter and the names of the weights that it changes.

    Args:
        folder: the adapter, for messages and patterns.
        config: its settings.
        tensors: what it stores.

    Raises:
        STFError: a name that is not PEFT's, or an update that is not finite.
    """

    def __init__(self, folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if not key.startswith(PREFIX):
                raise STFError(f"{folder}: {key}: not a name of PEFT, which start with {PREFIX!r}")
            self._tensors[key.removeprefix(PREFIX)] = tensor
        self._folder, self._config = folder, config
        factors = dict(self._factors())
        self._settings = settings_of(config, factors, folder)
        self._shapes: dict[str, Shape] = {}
        for module, (A, B) in factors.items():
            self._shapes[f"{module}.weight"] = (B.shape[0], A.shape[1])
            if A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]:
                scale = config.scale(*self._settings[module])
                check_size(B, A, scale, module, str(folder))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the weights that the adapter changes; a factored one may be transposed."""
        whole = {
            weight_of(name): tuple(tensor.shape)
            for name, tensor in self._tensors.items()
            if weight_of(name) not in self._shapes and ".lora_" not in name
        }
        return {**self._shapes, **whole}

    def write(self, names: Mapping[str, str], out: Path) -> None:
        """Write the adapter with other names for some of its weights.

        Args:
            names: the new ones.
            out: an existing folder.
        """
        moved = {name: self._moved(name, weight_of(name), names) for name in self._tensors}
        content = {PREFIX + moved[name]: tensor for name, tensor in self._tensors.items()}
        save_file(content, out / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = json.loads((self._folder / CONFIG_FILE).read_text(encoding="utf-8"))
        settings |= self._plain(names, settings.get("modules_to_save"))
        (out / CONFIG_FILE).write_text(json.dumps(settings, sort_keys=True), encoding="utf-8")

    def _factors(self) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        for A, B in FACTORS:
            for name, tensor in self._tensors.items():
                module = name.removesuffix(f".{A}")
                other = self._tensors.get(f"{module}.{B}")
                if module != name and other is not None:
                    yield module, (tensor, other)

    def _moved(self, name: str, weight: str, names: Mapping[str, str]) -> str:
        owner, _, _ = weight.rpartition(".")
        new, _, _ = names.get(weight, weight).rpartition(".")
        return new + name.removeprefix(owner)

    def _plain(self, names: Mapping[str, str], saved: list[str] | None) -> dict[str, object]:
        """Return the settings that name modules, each module in full."""
        modules = {m: self._moved(m, f"{m}.weight", names) for m in self._settings}
        patterns = {m: f"^{re.escape(new)}" for m, new in modules.items()}
        ranks = {patterns[m]: rank for m, (rank, _) in self._settings.items()}
        alphas = {patterns[m]: alpha for m, (_, alpha) in self._settings.items()}
        return {
            "target_modules": sorted(modules.values()),
            "modules_to_save": sorted(self._saved(names, saved or [])) or None,
            "rank_pattern": {p: rank for p, rank in ranks.items() if rank != self._config.r},
            "alpha_pattern": {p: a for p, a in alphas.items() if a != self._config.lora_alpha},
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    def _saved(self, names: Mapping[str, str], ends: list[str]) -> set[str]:
        """Return the modules that are stored as a whole, those of ``modules_to_save``."""
        found = set()
        for weight in self.shapes:
            old, new = weight.split("."), names.get(weight, weight).split(".")
            for cut in range(1, min(len(old), len(new))):
                module = ".".join(old[:-cut])
                if module not in self._settings and any(module.endswith(end) for end in ends):
                    found.add(".".join(new[:-cut]))
        return found
