"""The model card of a merge: the same text in every process, nothing asked of the network."""

from __future__ import annotations

import os
import re

import yaml
from mergekit.card import method_md
from mergekit.config import MergeConfiguration

from mergekit_stf.text import printable

TEMPLATE = """---
{metadata}---
# {name}

A merge of pretrained models, made with [mergekit](https://github.com/arcee-ai/mergekit) and the
merge method {method}.{lock}

## Models
{base}{models}

## Recipe

{fence}yaml
{recipe}
{fence}
"""


PLAIN = re.compile(r"[\w .-]+", re.ASCII)
"""Names without a character that means something in Markdown or HTML, but for emphasis."""

LOCKED = " `stf.lock.json` lists every input and output file with its SHA-256."


def make_card(
    config: MergeConfiguration,
    text: str,
    name: str,
    library: str = "transformers",
    locked: bool = True,
) -> str:
    """Return the card of a merge as Markdown; what comes from the recipe is escaped.

    Args:
        config: the recipe.
        text: the recipe as written.
        name: the name of the merged model.
        library: that loads it.
        locked: whether a lock file lies beside it.
    """
    recipe = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    models = [model for model in config.referenced_models() if model != config.base_model]
    base = f"\n- base: {_code(str(config.base_model))}" if config.base_model else ""
    return TEMPLATE.format(
        metadata=yaml.safe_dump(_metadata(config, library), sort_keys=True, allow_unicode=True),
        name=name if PLAIN.fullmatch(name) else _code(name),
        method=method_md(config.merge_method),
        lock=LOCKED if locked else "",
        base=base,
        models="".join(f"\n- {_code(str(model))}" for model in sorted(models, key=str)),
        fence=_fence(recipe),
        recipe=recipe,
    )


def _metadata(config: MergeConfiguration, library: str) -> dict[str, object]:
    parts = [part for model in config.referenced_models() for part in (model.model, model.lora)]
    hub = {part.path for part in parts if part is not None and not os.path.exists(part.path)}
    return {
        "base_model": sorted(hub),
        "library_name": library,
        "tags": ["merge", "mergekit"],
    }


def _code(name: str) -> str:
    """Write a name so that nothing in it is Markdown: no link, no HTML, no line of its own."""
    text = printable(name)
    fence = _fence(text, least=1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _fence(text: str, least: int = 3) -> str:
    count = least
    while "`" * count in text:
        count += 1
    return "`" * count
