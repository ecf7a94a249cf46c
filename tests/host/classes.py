"""Tiny models of any class of transformers, from its own default configuration made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "embedding_size",
            "word_embed_proj_dim",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "d_ff",
            "n_inner",
            "hidden_dim",
            "ffn_dim",
            "ffn_hidden_size",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "shared_intermediate_size",
            "intermediate_size_mlp",
            "ffn_intermediate_size",
            "block_ff_dim",
        ),
        24,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
            "depth",
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_key_value_heads",
            "num_experts_per_tok",
        ),
        2,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "state_size"), 4),
    **dict.fromkeys(
        ("head_dim", "d_kv", "rotary_dim", "image_size", "q_lora_rank", "kv_lora_rank"), 8
    ),
    "moe_intermediate_size": 12,
    "projection_dim": 12,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "out_hidden_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "patch_size": 4,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "vocab_size": 40,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "max_source_positions": 16,
    "max_target_positions": 16,
}


AUDIO: dict[str, Any] = {
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM:biases": {"attention_bias": True},
    "ArceeForCausalLM:biases": {"attention_bias": True, "mlp_bias": True},
    "BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "CohereForCausalLM:norms": {"attention_bias": True, "use_qk_norm": True},
    "Cohere2ForCausalLM:biases": {"attention_bias": True},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "ConvNextV2ForImageClassification": {
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "DeepseekV3ForCausalLM:dense first": {"first_k_dense_replace": 1},
    "FalconForCausalLM:new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconForCausalLM:two norms": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "Gemma3ForConditionalGeneration:no head": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        }
    },
    "FalconForCausalLM:biases": {"bias": True, "parallel_attn": False, "alibi": True},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM:no biases": {"attention_bias": False},
    "GPTNeoXForCausalLM:tied": {"tie_word_embeddings": True},
    "GemmaForCausalLM:biases": {"attention_bias": True},
    "Gemma2ForCausalLM:biases": {"attention_bias": True},
    "Gemma3ForCausalLM:biases": {"attention_bias": True},
    "Glm4ForCausalLM:biases": {"attention_bias": True},
    "Glm4MoeForCausalLM:norms": {
        "attention_bias": True,
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
    },
    "GraniteForCausalLM:biases": {"attention_bias": True, "mlp_bias": True},
    "GraniteMoeHybridForCausalLM": {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
    },
    "GraniteMoeHybridForCausalLM:dense": {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "LlamaForCausalLM:biases": {"attention_bias": True, "mlp_bias": True},
    "LlamaForCausalLM:tied": {"tie_word_embeddings": True},
    "LlamaForSequenceClassification:biases": {"attention_bias": True, "mlp_bias": True},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "Olmo2ForCausalLM:biases": {"attention_bias": True},
    "PhiForCausalLM:norms": {"qk_layernorm": True},
    "Qwen2ForCausalLM:tied": {"tie_word_embeddings": True},
    "Qwen2VLForConditionalGeneration:tied": {"tie_word_embeddings": True},
    "Qwen2_5_VLForConditionalGeneration:tied": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM:biases": {"attention_bias": True},
    "Qwen3MoeForCausalLM:biases": {"attention_bias": True},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
    },
    "StableLmForCausalLM:biases": {"use_qkv_bias": True},
    "StableLmForCausalLM:norms": {"qk_layernorm": True},
    "StableLmForCausalLM:parallel": {"use_parallel_residual": True},
    "Starcoder2ForCausalLM:no biases": {"use_bias": False},
    "SwinForImageClassification": {
        "num_heads": [2, 2],
        "depths": [1, 1],
        "image_size": 16,
        "window_size": 2,
    },
    "HubertModel": AUDIO,
    "HubertForCTC": AUDIO,
    "Wav2Vec2ForCTC": AUDIO,
    "Wav2Vec2ForSequenceClassification": AUDIO,
    "T5ForConditionalGeneration": {"feed_forward_proj": "relu"},
    "T5ForConditionalGeneration:1.1": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}
"""Options without which a class cannot be small, and other shapes of the same class."""

AUDITED = sorted(
    [
        *(Path(__file__).parent / "audited.txt").read_text().split(),
        *(label for label in VARIANTS if ":" in label),
    ]
)
"""Classes of the host's tables that transformers has, and those that people download most."""


def small(config_class: type[PretrainedConfig], **options: Any) -> PretrainedConfig:
    """Return a configuration whose sizes are small wherever the class has a size by that name."""
    default = config_class()
    known = default.to_dict()
    values = {name: value for name, value in SMALL.items() if name in known}
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None:
            values[name] = small(type(sub)).to_dict()
    return config_class(**(values | options))


def configuration(label: str) -> PretrainedConfig:
    """Return the small configuration of a class, or of a variant after a colon."""
    name = label.split(":")[0]
    config = small(getattr(transformers, name).config_class, **VARIANTS.get(label, {}))
    config.architectures = [name]
    return config


def meta_model(label: str) -> PreTrainedModel:
    """Build a small model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, label.split(":")[0])(configuration(label))
    return model
