"""Tiny models of real architectures, made on the spot: a base and tuned copies of it, saved.

``FAMILIES`` maps a family's name to a function that builds its base in float32. ``save_family``
writes a base and its tuned copies as ordinary Hugging Face checkpoints.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 16, 24, 2, 2, 40
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}


@dataclass(frozen=True)
class Checkpoints:
    """Folders of a base and of its tuned copies."""

    base: Path
    tuned: tuple[Path, ...]


def build(model_class: str, config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Instantiate a class of transformers with reproducible weights, norms and biases included."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    _add_noise(model, 0.05)
    return model.eval()


def perturb(model: PreTrainedModel, seed: int, scale: float = 0.02) -> PreTrainedModel:
    """Return a copy with noise on every parameter; tied weights stay tied."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(model)
    _add_noise(tuned, scale)
    return tuned


def _add_noise(model: PreTrainedModel, scale: float) -> None:
    """Move what training moves; tables of sines, which no checkpoint holds, stay."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def save_family(
    family: str,
    root: Path,
    tasks: int = 3,
    dtype: torch.dtype = torch.float32,
    layout: str = "single",
) -> Checkpoints:
    """Write the base of a family and ``tasks`` tuned copies under ``root``."""
    return save_model(FAMILIES[family](), root, tasks, dtype, layout)


def save_model(
    model: PreTrainedModel,
    root: Path,
    tasks: int = 3,
    dtype: torch.dtype = torch.float32,
    layout: str = "single",
) -> Checkpoints:
    """Write a model and ``tasks`` perturbed copies of it under ``root``, see `lay_out`."""
    copies = [model, *(perturb(model, seed) for seed in range(1, tasks + 1))]
    folders = [root / "base", *(root / f"tuned{seed}" for seed in range(1, tasks + 1))]
    for one, folder in zip(copies, folders, strict=True):
        (one if dtype == torch.float32 else one.to(dtype)).save_pretrained(folder)
        lay_out(folder, layout)
    return Checkpoints(folders[0], tuple(folders[1:]))


def llama(**options: Any) -> PreTrainedModel:
    return build("LlamaForCausalLM", transformers.LlamaConfig(**(TEXT | options)))


def llama_biased() -> PreTrainedModel:
    return llama(attention_bias=True, mlp_bias=True)


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=32,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build("GPT2LMHeadModel", config)


def _t5(feed_forward: str, tied: bool) -> PreTrainedModel:
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        vocab_size=VOCABULARY,
        relative_attention_num_buckets=8,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    return build("T5ForConditionalGeneration", config)


def t5() -> PreTrainedModel:
    """T5 1.0: one matrix before the activation, output tied to the embedding."""
    return _t5("relu", tied=True)


def t5_v1_1() -> PreTrainedModel:
    """T5 1.1: a gated activation and an output matrix of its own."""
    return _t5("gated-gelu", tied=False)


def qwen3() -> PreTrainedModel:
    return build("Qwen3ForCausalLM", transformers.Qwen3Config(**TEXT, head_dim=8))


def gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(**TEXT, head_dim=8, query_pre_attn_scalar=8)
    return build("Gemma3ForCausalLM", config)


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    return build("MixtralForCausalLM", config)


def qwen3_moe() -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    )
    return build("Qwen3MoeForCausalLM", config)


def bert() -> PreTrainedModel:
    return build("BertModel", transformers.BertConfig(**TEXT))


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        hidden_size=HIDDEN, state_size=4, num_hidden_layers=LAYERS, vocab_size=VOCABULARY
    )
    return build("MambaForCausalLM", config)


def clip_vision() -> PreTrainedModel:
    return build("CLIPVisionModel", transformers.CLIPVisionConfig(**IMAGE))


def clip() -> PreTrainedModel:
    config = transformers.CLIPConfig(
        text_config=dict(TEXT), vision_config=dict(IMAGE), projection_dim=12
    )
    return build("CLIPModel", config)


def vit() -> PreTrainedModel:
    return build("ViTForImageClassification", transformers.ViTConfig(**IMAGE, num_labels=5))


def whisper() -> PreTrainedModel:
    config = transformers.WhisperConfig(
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return build("WhisperForConditionalGeneration", config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-biased": llama_biased,
    "gpt2": gpt2,
    "t5": t5,
    "t5-v1.1": t5_v1_1,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "bert": bert,
    "mamba": mamba,
    "clip-vision": clip_vision,
    "clip": clip,
    "vit": vit,
    "whisper": whisper,
}


LAYOUTS = ("single", "sharded", "pickled")
SHARDS = 3


def lay_out(folder: Path, layout: str) -> Path:
    """Store a checkpoint of one file in another way, and return its folder.

    ``sharded`` is a model as the hub's cache holds it: shards, an index, and links into a folder
    of blobs. ``pickled`` are shards of pickles. Neighbours come to lie in different shards.
    """
    if layout == "single":
        return folder
    suffix = "safetensors" if layout == "sharded" else "bin"
    stem = "model" if layout == "sharded" else "pytorch_model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"{stem}-{n + 1:05d}-of-{SHARDS:05d}.{suffix}" for n in range(SHARDS)]
    places = {name: files[n % SHARDS] for n, name in enumerate(sorted(tensors))}
    for file in files:
        shard = {name: tensors[name] for name in tensors if places[name] == file}
        if layout == "sharded":
            save_file(shard, folder / file, {"format": "pt"})
        else:
            torch.save(shard, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if layout == "sharded":
        _link(folder, folder.parent / "blobs" / folder.name)
    return folder


def _link(folder: Path, blobs: Path) -> None:
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint of safetensors, in one file or in shards."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
