"""``adapter_config.json`` of PEFT: what it says about a LoRA adapter, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FiniteFloat,
    PositiveInt,
    ValidationError,
)

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.patterns import Matcher, pattern_problem
from mergekit_stf.host.checkpoints.files import read_text

FULL_ROUTE = "merge full copies instead: mergekit-stf merge CONFIG OUT --lora-merge-dtype float32"
CONVERT = (
    "its training changed the base weights; save it again with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)

REFUSED: Mapping[str, str] = {
    "use_dora": f"DoRA is not a low-rank update; {FULL_ROUTE}",
    "use_qalora": f"QALoRA pools its inputs; {FULL_ROUTE}",
    "use_bdlora": f"block-diagonal factors are not read; {FULL_ROUTE}",
    "kasa_config": f"KaSA changes the base weights; {FULL_ROUTE}",
    "monteclora_config": f"its factors are sampled; {FULL_ROUTE}",
    "lora_bias": f"a bias inside the factors is not read; {FULL_ROUTE}",
    "arrow_config": "its routing depends on the input, so no merged weights exist",
    "alora_invocation_tokens": "it acts on some tokens only, so no merged weights exist",
    "layer_replication": "it repeats layers of the base; repeat them in the base first",
    "target_parameters": f"factors of bare parameters (experts) are not read; {FULL_ROUTE}",
    "trainable_token_indices": f"trained token rows are not read; {FULL_ROUTE}",
    "megatron_config": "Megatron's parallel layers are not read; save it with plain PEFT layers",
}

HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "parent_library",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
    ]
)

PLAIN_STARTS = frozenset({True, False, "gaussian", "eva", "orthogonal"})

EMPTY = BeforeValidator(lambda value: {} if value is None else value)
"""PEFT allows ``null`` for no patterns."""


class AdapterConfig(BaseModel):
    """The settings that decide the value of a LoRA update.

    Attributes:
        peft_type: must be ``LORA``.
        r: the rank of every module that ``rank_pattern`` does not name.
        lora_alpha: the numerator of the scale, unless ``alpha_pattern`` names the module.
        use_rslora: divide by the square root of the rank instead of the rank.
        rank_pattern: regular expressions of module names, and their ranks.
        alpha_pattern: regular expressions of module names, and their numerators.
        init_lora_weights: how training began; some ways change the base weights.
        task_type: what PEFT wraps the model for.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8.0
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, PositiveInt], EMPTY] = {}
    alpha_pattern: Annotated[dict[str, FiniteFloat], EMPTY] = {}
    init_lora_weights: bool | str | None = True
    task_type: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None

    @property
    def expressions(self) -> list[str]:
        """Every setting that PEFT reads as a regular expression."""
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        return [*whole, *self.rank_pattern, *self.alpha_pattern]

    def settings(self, modules: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return rank and ``alpha`` of each module.

        Raises:
            TimeoutError: a pattern that backtracks without end.
        """
        ranks, alphas = Matcher(self.rank_pattern), Matcher(self.alpha_pattern)
        found = {}
        for module in modules:
            key, other = ranks.first(module), alphas.first(module)
            rank = self.r if key is None else self.rank_pattern[key]
            alpha = self.lora_alpha if other is None else self.alpha_pattern[other]
            found[module] = rank, alpha
        return found

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of ``B A``: ``alpha / r``, with rsLoRA ``alpha / sqrt(r)``."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(path: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json`` of an adapter whose factors are merged.

    Raises:
        STFError: not a plain LoRA adapter; the message names the setting and what to do.
    """
    config = read_settings(path)
    problem = _problem(config)
    if problem:
        raise STFError(f"{path}: {problem}")
    return config


def read_settings(path: Path) -> AdapterConfig:
    """Read ``adapter_config.json`` of any adapter that PEFT may merge.

    Raises:
        STFError: the file is none, its numbers are none, or a pattern cannot be used.
    """
    try:
        config = AdapterConfig.model_validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise STFError(f"{path}: {where}: {first['msg']}") from error
    for pattern in config.expressions:
        if problem := pattern_problem(pattern):
            raise STFError(f"{path}: pattern {_short(pattern)} {problem}; name the modules plainly")
    return config


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:60]}…")


def _problem(config: AdapterConfig) -> str | None:
    if config.peft_type != "LORA":
        return f"peft_type {config.peft_type!r}, only LORA adapters are merged; {FULL_ROUTE}"
    if config.init_lora_weights not in PLAIN_STARTS | {None}:
        return f"init_lora_weights {config.init_lora_weights!r}: {CONVERT}"
    for key, value in (config.model_extra or {}).items():
        if key in HARMLESS or not value:
            continue
        reason = REFUSED.get(key, f"a setting that is not known here; {FULL_ROUTE}")
        return f"{key}: {value!r}: {reason}"
    return None
