"""Settings in which models of equal shapes differ, though their weights were trained for them.

A merged model gets the base's configuration. Weights that were tuned with another frequency of
the position embedding, other heads or another activation then compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from transformers import PretrainedConfig

from mergekit_stf.host.recipe.yaml_text import short_repr

SETTINGS = (
    # positions
    "rope_parameters",  # transformers puts rope_theta and rope_scaling in there
    "partial_rotary_factor",
    "max_position_embeddings",
    "position_embedding_type",
    "relative_attention_max_distance",
    # attention
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "d_kv",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "attention_multiplier",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "scale_attn_by_inverse_layer_idx",
    # activations and norms
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "is_gated_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    # scales of the stream and of the output
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
    "scale_decoder_outputs",
    "tie_word_embeddings",
    # experts
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
)
"""What changes the function of weights and shows in no shape, by transformers' names; names of
single architectures (``n_head``) are read through them."""


def config_differences(config: MergeConfiguration, trust_remote_code: bool) -> Iterator[str]:
    """Yield a line for each setting in which a model differs from the base.

    Args:
        config: a recipe.
        trust_remote_code: whether a model's own configuration class may be run.
    """
    base, *others = sorted(
        {ModelReference(model=one.model) for one in config.referenced_models()},
        key=lambda model: (str(model.model) != _base_of(config), str(model)),
    )
    expected = _settings(base.config(trust_remote_code))
    found: dict[tuple[str, str, str], list[str]] = {}
    for model in others:
        settings = _settings(model.config(trust_remote_code))
        for name, value in settings.items():
            if name in expected and value != expected[name]:
                here, there = _parts(expected[name], value)
                found.setdefault((name, here, there), []).append(str(model))
    for (name, here, there), models in found.items():
        yield (
            f"{name} is {here} in {base} and {there} in {', '.join(models)}; the merged model "
            f"gets {here}, and what was tuned for another value may not work with it"
        )


def _base_of(config: MergeConfiguration) -> str:
    return str((config.base_model or config.referenced_models()[0]).model)


def _settings(config: PretrainedConfig, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a configuration and of those nested in it."""
    found = {prefix + name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
    for key in config.sub_configs:
        if isinstance(nested := getattr(config, key, None), PretrainedConfig):
            found |= _settings(nested, f"{prefix}{key}.")
    return found


def _parts(one: Any, other: Any) -> tuple[str, str]:
    """Write two values, of mappings and lists only the entries that differ."""
    parts = [dict(enumerate(part)) if isinstance(part, list) else part for part in (one, other)]
    if all(isinstance(part, Mapping) for part in parts):
        keys = [key for key in {**parts[0], **parts[1]} if parts[0].get(key) != parts[1].get(key)]
        parts = [{key: part.get(key) for key in keys} for part in parts]
    return short_repr(parts[0]), short_repr(parts[1])
