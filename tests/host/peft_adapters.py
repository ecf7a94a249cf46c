"""LoRA adapters made on the spot with PEFT, and the full models that PEFT makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEAR = ["c_attn", "c_proj", "c_fc"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model in one type, by the class that its configuration names."""
    model_class = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: PreTrainedModel = getattr(transformers, model_class).from_pretrained(folder, dtype=dtype)
    return model.eval()


def save_adapter(base: Path, out: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter whose factors, and whatever else it trains, are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load(base), peft.LoraConfig(**({"r": 3} | settings)))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(out)
    return out


def with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a base and put an adapter on it with PEFT, unmerged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(base, dtype), adapter).eval()


def save_full(base: Path, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the full model that PEFT makes of a base and an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapter(base, adapter, dtype).merge_and_unload().save_pretrained(out)
    return out


def recipe(base: Path, models: Sequence[str], **rest: Any) -> dict[str, Any]:
    """Return a recipe for ``stf`` over these models."""
    entries = [{"model": model} for model in models]
    return {"merge_method": "stf", "base_model": str(base), "models": entries} | rest


def on_base(base: Path, adapters: Sequence[Path]) -> list[str]:
    """Return the references ``base+adapter``."""
    return [f"{base}+{adapter}" for adapter in adapters]


def write(content: dict[str, Any], path: Path) -> Path:
    """Write a recipe file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }
