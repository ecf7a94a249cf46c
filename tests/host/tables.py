"""Writes the architecture tables of the package from the classes of transformers.

``python -m tests.host.tables`` rewrites ``mergekit_stf/host/architectures/*.json`` in the host's
own format; ``test_architectures.py`` holds the files against what this module makes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mergekit_stf.host
from mergekit_stf.host.architectures.exact import weights_of, without_ties
from mergekit_stf.host.architectures.loading import hollow_model
from tests.host.classes import SMALL, configuration

FOLDER = Path(mergekit_stf.host.__file__).parent / "architectures"
Weight = dict[str, Any]


@dataclass(frozen=True)
class Module:
    """Where a module's weights are: those that ``owned`` matches, its layers after ``stack``."""

    owned: str
    stack: str | None = None
    layers_key: str | None = None


@dataclass(frozen=True)
class Table:
    """One file: the classes it serves, the shapes it is made of, and its modules."""

    architectures: list[str]
    variants: list[str]
    modules: dict[str, Module]
    files: list[str] = field(default_factory=list)
    spellings: dict[str, str] = field(default_factory=dict)


def one_stack(
    classes: str, stack: str, variants: str = "", key: str = "num_hidden_layers", **more: Any
) -> Table:
    """Return a table of one stack of layers; variants are options beside the default."""
    names = classes.split()
    labels = [names[0], *(f"{names[0]}:{v}" for v in variants.split(", ") if v)]
    return Table(names, labels, {"default": Module("", stack, key)}, **more)


def _qwen_vl(name: str) -> Table:
    modules = {
        "text_decoder": Module("", "model.layers", "text_config.num_hidden_layers"),
        "multi_modal_projector": Module(r"visual\.merger\."),
        "vision_tower": Module(r"visual\.", "visual.blocks", "vision_config.depth"),
    }
    files = ["preprocessor_config.json", "vocab.json"]
    return Table([name], [name, f"{name}:tied"], modules, files=files)


GAMMA = {r"LayerNorm\.weight$": "LayerNorm.gamma", r"LayerNorm\.bias$": "LayerNorm.beta"}
TABLES = {
    "bert": one_stack("BertModel", "encoder.layer", spellings=GAMMA),
    "bert-masked-lm": one_stack("BertForMaskedLM", "bert.encoder.layer", spellings=GAMMA),
    "bert-pretraining": one_stack("BertForPreTraining", "bert.encoder.layer", spellings=GAMMA),
    "bert-question-answering": one_stack(
        "BertForQuestionAnswering", "bert.encoder.layer", spellings=GAMMA
    ),
    "cohere": one_stack("CohereForCausalLM", "model.layers", "norms"),
    "distilbert": one_stack("DistilBertModel", "transformer.layer", spellings=GAMMA),
    "falcon": one_stack("FalconForCausalLM", "transformer.h", "new, biases, two norms"),
    "gpt-neox": one_stack("GPTNeoXForCausalLM", "gpt_neox.layers", "no biases, tied"),
    "phi": one_stack("PhiForCausalLM", "model.layers", "norms"),
    "roberta": one_stack("RobertaModel", "encoder.layer", spellings=GAMMA),
    "roberta-question-answering": one_stack(
        "RobertaForQuestionAnswering", "roberta.encoder.layer", spellings=GAMMA
    ),
    "starcoder2": one_stack("Starcoder2ForCausalLM", "model.layers", "no biases"),
    "vit": one_stack("ViTModel", "encoder.layer"),
    "vit-image-classification": one_stack("ViTForImageClassification", "vit.encoder.layer"),
    "t5": Table(
        ["T5ForConditionalGeneration"],
        ["T5ForConditionalGeneration", "T5ForConditionalGeneration:1.1"],
        {
            "decoder": Module(r"decoder\.", "decoder.block", "num_decoder_layers"),
            "encoder": Module(r"encoder\.", "encoder.block", "num_layers"),
            "shared": Module(""),
        },
    ),
    "whisper": Table(
        ["WhisperForConditionalGeneration"],
        ["WhisperForConditionalGeneration"],
        {
            "decoder": Module("", "model.decoder.layers", "decoder_layers"),
            "encoder": Module(r"model\.encoder\.", "model.encoder.layers", "encoder_layers"),
        },
        files=["preprocessor_config.json", "normalizer.json"],
    ),
    "clip": Table(
        ["CLIPModel"],
        ["CLIPModel"],
        {
            "text_model": Module(
                r"text_model\.", "text_model.encoder.layers", "text_config.num_hidden_layers"
            ),
            "vision_model": Module(
                r"vision_model\.", "vision_model.encoder.layers", "vision_config.num_hidden_layers"
            ),
            "shared": Module(""),
        },
        files=["preprocessor_config.json"],
    ),
    "gemma3vl": Table(
        ["Gemma3ForConditionalGeneration"],
        ["Gemma3ForConditionalGeneration", "Gemma3ForConditionalGeneration:no head"],
        {
            "text_decoder": Module(
                r"language_model\.|lm_head",
                "language_model.model.layers",
                "text_config.num_hidden_layers",
            ),
            "multi_modal_projector": Module(r"multi_modal_projector\."),
            "vision_tower": Module(
                "", "vision_tower.encoder.layers", "vision_config.num_hidden_layers"
            ),
        },
        files=["preprocessor_config.json", "processor_config.json"],
    ),
    "mistral3": Table(
        ["Mistral3ForConditionalGeneration"],
        ["Mistral3ForConditionalGeneration"],
        {
            "text_decoder": Module(
                r"language_model\.|lm_head",
                "language_model.model.layers",
                "text_config.num_hidden_layers",
            ),
            "multi_modal_projector": Module(r"multi_modal_projector\."),
            "vision_tower": Module(
                "", "vision_tower.transformer.layers", "vision_config.num_hidden_layers"
            ),
        },
        files=["preprocessor_config.json", "processor_config.json"],
    ),
    "qwen2-vl": _qwen_vl("Qwen2VLForConditionalGeneration"),
    "qwen2.5-vl": _qwen_vl("Qwen2_5_VLForConditionalGeneration"),
}


def weights(label: str, spellings: dict[str, str], untied: bool = False) -> list[Weight]:
    """Return the weights of one tiny model with all their spellings."""
    config = configuration(label)
    model = hollow_model(without_ties(config) if untied else config)
    infos = [info.model_dump(exclude_defaults=True) for info in weights_of(model)]
    for info in infos:
        names = [info["name"], *info.get("aliases", ())]
        for old, new in spellings.items():
            names += [re.sub(old, new, name) for name in names]
        if aliases := list(dict.fromkeys(names))[1:]:
            info["aliases"] = aliases
    return infos


def folded(table: Table) -> dict[str, Weight]:
    """Return the table's weights with their layers folded, in the order of the model.

    A weight that a layer or a variant lacks is optional, and so is one that is tied to another: a
    checkpoint may hold it nevertheless, and then with values of its own. The host cannot plan an
    optional weight with aliases, so such a weight is known by its stored name only.
    """
    shapes = [_folded_once(label, table, u) for label in table.variants for u in (False, True)]
    merged: dict[str, Weight] = {}
    for shape in shapes:
        for name, weight in shape.items():
            known = merged.setdefault(name, {"name": name})
            known.update({k: v for k, v in weight.items() if k not in ("aliases", "tied_names")})
            for key in ("aliases", "tied_names"):
                known[key] = list(dict.fromkeys([*known.get(key, []), *weight.get(key, [])]))
    for name, weight in merged.items():
        if weight.get("optional") or not all(name in shape for shape in shapes):
            weight["optional"] = True
            _tie_back(weight, merged)
            weight["aliases"] = []
    return {name: {k: v for k, v in w.items() if v != []} for name, w in merged.items()}


def _folded_once(label: str, table: Table, untied: bool) -> dict[str, Weight]:
    stacks = [module.stack for module in table.modules.values() if module.stack]
    layer = re.compile(rf"^({'|'.join(map(re.escape, stacks))})\.(\d+)\.")
    found: dict[str, Weight] = {}
    counts: dict[str, int] = {}
    for weight in weights(label, table.spellings, untied):
        if layer.match(weight["name"]):
            spelled = [weight["name"], *weight.get("aliases", [])]
            name, *aliases = (re.sub(r"\.\d+\.", ".${layer_index}.", n, count=1) for n in spelled)
            weight |= {"name": name, "aliases": aliases}
        name = weight["name"]
        counts[name] = counts.get(name, 0) + 1
        found.setdefault(name, weight)
    for name, weight in found.items():
        if "${" in name and counts[name] < SMALL["num_hidden_layers"]:
            weight["optional"] = True
    return found


def _tie_back(weight: Weight, known: dict[str, Weight]) -> None:
    """Let a weight that some variants tie fall back on the one it is tied to, of the same axis."""
    spelled = {weight["name"], *weight["aliases"]}
    for other in known.values():
        if spelled.intersection(other.get("tied_names", [])):
            weight["tied_names"] = [other["name"]]
            weight |= {k: v for k, v in other.items() if k == "vocabulary_axis"}


def document(table: Table) -> dict[str, Any]:
    """Return a table in the host's format."""
    config = configuration(table.variants[0])
    known = folded(table)
    head = {"architectures": table.architectures, "model_type": config.model_type}
    if list(table.modules) == ["default"]:
        return head | _module(known, table.modules["default"])
    modules = {}
    for name, module in table.modules.items():
        owned = {k: w for k, w in known.items() if _owner(k, table) == name}
        blank = {"architectures": [], "model_type": ""}
        modules[name] = {"architecture": blank | _module(owned, module)}
    extra = {"tagalong_files": table.files} if table.files else {}
    if hasattr(config, "text_config"):
        extra["vocab_size_config_key"] = "text_config.vocab_size"
    return {"kind": "modular", **head, **extra, "modules": modules}


def _owner(name: str, table: Table) -> str:
    narrow = (k for k, m in table.modules.items() if m.owned and re.match(m.owned, name))
    return next(narrow, next(k for k, m in table.modules.items() if not m.owned))


def _module(known: dict[str, Weight], module: Module) -> dict[str, Any]:
    layers = [weight for name, weight in known.items() if "${" in name]
    names = list(known)
    first = next((i for i, name in enumerate(names) if "${" in name), len(names))
    count = {"num_layers_config_key": module.layers_key} if module.stack else {}
    return {
        "pre_weights": [known[name] for name in names[:first]],
        **(count or {"override_num_layers": 0}),
        "layer_templates": {"weights": layers},
        "post_weights": [known[name] for name in names[first:] if "${" not in name],
    }


def text(table: Table) -> str:
    """Return a table as JSON with one weight a line."""
    lines = json.dumps(document(table), indent=2)
    return re.sub(r"\{\s+\"name\".*?\n\s*\}", _one_line, lines, flags=re.DOTALL) + "\n"


def _one_line(match: re.Match[str]) -> str:
    return json.dumps(json.loads(match.group(0)))


def main() -> None:
    """Write all tables."""
    for stem, table in TABLES.items():
        (FOLDER / f"{stem}.json").write_text(text(table))


if __name__ == "__main__":
    main()
