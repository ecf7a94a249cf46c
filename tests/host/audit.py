"""Writes ``docs/architectures.md``: which classes merge, by whose table, and what is left.

``python -m tests.host.audit`` rewrites the page; ``test_architectures.py`` holds the page against
what this module makes, and merges every class of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mergekit
from mergekit.architecture.json_definitions import NAME_TO_ARCH

from mergekit_stf.host import architectures
from mergekit_stf.host.architectures.exact import ExactArchitecture, weights_of
from tests.host.classes import AUDITED, meta_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

EXCEPTIONS = {
    r"convnext(v2)?\.encoder\.stages\.\d+\.downsampling_layer\.0\.bias": (
        "sum",
        "mean",
        "a layer norm at a numbered place of a sequence; the name of its bias does not say so",
    ),
    r"lm_head\.weight": (
        "sum",
        "superpose",
        "the classifier of an audio model (`ForCTC`) under the name of an output vocabulary, "
        "of which it is one: its rows are characters",
    ),
}
"""Names for which the rule is not the one of the owning module: rule, module's rule, reason."""

REFUSED = {
    "Mistral3Model, LlavaModel and other bare multimodal models": "transformers itself saves them "
    "under the names of the model with a head; use the class with a head",
    "GPTNeoXForCausalLM saved with `save_original_format=False`": "`lm_head.weight` is there "
    "where `embed_out.weight` is expected, and the host cannot plan an optional weight "
    "(it may be tied) with two names",
    "models with code of their own (`trust_remote_code`)": "without a class in transformers the "
    "names in the files count as they are; the host's tables serve Baichuan, ChatGLM, Exaone 3, "
    "InternLM 2, Jais, Phi-3 small, Qwen 1 and Solar",
}
"""What is refused before any work, and why."""


def source(name: str, before: dict[str, list[object]]) -> str:
    """Say whose table serves a class."""
    tables = NAME_TO_ARCH.get(name)
    if name == "Glm4MoeForCausalLM":
        return "host"  # dispatched before the tables
    if not tables:
        return "host, inferred"
    if tables == before.get(name):
        return "host"
    module = next(iter(tables[-1].modules.values())).architecture
    return "ours, exact" if isinstance(module, ExactArchitecture) else "ours"


def rows() -> Iterator[str]:
    """Yield a line of the table per class and variant."""
    raw = mergekit.architecture.json_definitions._load_all_architectures()[1]
    architectures.register_tables()
    for label in AUDITED:
        name, _, variant = label.partition(":")
        count = len(weights_of(meta_model(label)))
        yield f"| `{name}` | {variant} | {source(name, raw)} | {count} |"


TEXT = """# Architectures

Which models `merge_method: stf` merges whole, and by whose table of names. Every row is a tiny
model of that class with two tuned copies, merged through the host, loaded again by transformers
without a missing or unexpected weight, and compared with the float64 reference to 1e-4 on every
weight (`tests/host/test_architectures.py`; this page is written by `python -m tests.host.audit`).

- **host**: the table that comes with mergekit.
- **ours**: a table in `mergekit_stf/host/architectures/*.json`, or the host's with the optional
  biases that it lacks or without a buffer that only old files have.
- **ours, exact**: the names come from the class in transformers and the model's own configuration,
  because layers differ from each other or the host would take the class for another one.
- **host, inferred**: the host reads the names off the class; it does so well for these.

Our tables serve every merge method of mergekit, not only `stf`, and the tools that read one model,
such as `mergekit-extract-lora`: these see the biases and other optional weights that the model's
configuration gives it, and no others. A test runs every command of mergekit with and without the
package and compares what it writes (`tests/host/test_host_tools.py`); the only differences are
weights that mergekit's own tables lose. `MERGEKIT_STF_TABLES=0` in the environment leaves mergekit
its own tables alone: `stf` then stops where they would lose a weight, and
`mergekit-stf doctor` says which tables are in use.

A class that is not in the table goes the host's way too. Before a weight is read, the names in the
checkpoints are compared with the names that will be written, in terms of the parameters that
transformers would fill from them. If one would be lost the merge stops:

{example}

The ways out: merge by the names in the files with `mergekit-pytorch`; or set
`MERGEKIT_STF_ALLOW_LOSS=1`, and the same text is a warning.

Tensors of the base for which its class has no use are kept: layers that predict several tokens
ahead (`mtp.*` of Qwen3.5, layer `num_hidden_layers` of DeepSeek-V3 and GLM-4.5), the head of
another task. Where all models have them they are merged like the rest, else copied from the base;
one warning names their kinds. Slices that make a model of another number of layers leave out those
that lie in the stack of layers, and the warning says so. Tables that a class computes by itself
(`rotary_emb.inv_freq`, `attn.bias` of old GPT-2 files) are not carried on.

## Quantised checkpoints

They are found before any work, by the names and types of their tensors and by
`quantization_config`.

| format | `mergekit-stf` | plain `mergekit-yaml` |
|---|---|---|
| mxfp4 (GPT-OSS) | dequantised on read | refused, and sent there |
| fp8 with its scales (DeepSeek-V3) | dequantised on read | refused, and sent there |
| GGUF | refused, with the lines of Python that convert it | the same |
| all others (GPTQ, AWQ, bitsandbytes, HQQ, NVFP4, ...) | refused by name | the same |

Dequantised weights are bfloat16, or float32 where the configuration says so; the output is not
quantised, and its configuration does not say that it is. An adapter that `merge` would turn into a
full copy (`base+adapter`) needs a base that is not quantised; `mergekit-stf lora` takes one in
mxfp4 or fp8.

## Refused

{refused}

## Rules that a name cannot give

The rule of a weight comes from its name, shape and vocabulary axis. For every weight of every class
below it is the rule of the module that owns the weight, with these exceptions; the parameter
`rule` with a filter overrides each:

{exceptions}

## Fused projections and experts

A fused projection is merged whole, as the paper does. The parameter `split` takes it apart into the
linear maps that it stacks, each of which is then trimmed, decomposed and superposed by itself:

    parameters:
      split:
        - filter: c_attn
          value: columns 3

| model | filter | value |
|---|---|---|
| GPT-2 | `c_attn` | `columns 3` (its matrices are transposed) |
| Phi-3 | `gate_up_proj` | `rows 2` |
| Phi-3 mini | `qkv_proj` | `rows 3`; with fewer key heads the sizes: `rows 5120,1280,1280` |
| Falcon 7B | `query_key_value` | `rows 4544,64,64` |
| Falcon 40B | `query_key_value` | `rows 1024,64,64 in 8` (8 groups of heads) |
| GPT-NeoX, Pythia, Bloom | `query_key_value` | `rows 3 in 12` (the number of heads) |
| SigLIP's pooling head | `in_proj_weight` | `rows 3` |

Experts are merged one by one, whether the files hold them apart or as a stack; both give the same
bytes. Routers and shared experts are ordinary matrices.

## Classes

| class | variant | table | weights |
|---|---|---|---:|
{rows}
"""

EXAMPLE = """    path/to/model: 8 weights would be missing from the merged model, because mergekit's
    table of this architecture does not name them: model.layers.*.self_attn.q_proj.bias (2), ..."""


def page() -> str:
    """Return the page's text."""
    return TEXT.format(
        example=EXAMPLE,
        refused="\n".join(f"- {what}: {why}." for what, why in REFUSED.items()),
        exceptions="\n".join(
            f"- `{name}`: `{rule}` instead of `{owner}`: {why}."
            for name, (rule, owner, why) in EXCEPTIONS.items()
        ),
        rows="\n".join(rows()),
    )


if __name__ == "__main__":
    PAGE.write_text(page())
