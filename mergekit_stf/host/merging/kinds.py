"""What a weight is in its model, from what mergekit tells a method about it.

A method receives a weight's name, shape and ``vocabulary_axis``. ``kind_for`` reads the kind from
these three; what a kind gets is the method's own table. ``tests/host/test_rules.py`` compares it
with the class of the module that owns the weight in transformers; ``docs/architectures.md`` lists
where a name says too little.
"""

import re
from collections.abc import Sequence

from mergekit_stf.core.methods import Kind

NORMALISATION = re.compile(r"norm|rms$|(^|_)(ln|bn)(_|\d|$)", re.IGNORECASE)
"""Modules: ``input_layernorm``, ``q_norm``, ``ln_1``, ``norm1``, CLIP's own ``pre_layrnorm``."""

TABLE = re.compile(
    r"^(wte|wpe|shared|lm_head|vocab_projector|codebook|emb|embed|embed_\w+|\w*_emb|\w+_tokens?"
    r"|\w*(?<!class_)embed|\w*embeds_layers?|\w*embeddings?(_\d+)?|\w*(bias|embeddings?)_table"
    r"|relative_attention_bias\w*)$"
)
"""Modules that look rows up, and the output matrix that shares or mirrors one."""

PROJECTION = re.compile(r"patch_embed|linear_embed")
"""Modules that ``TABLE`` would take and that multiply their input all the same."""

VECTOR = re.compile(
    r"bias|token|position|embed|_emb$|rel_pos|latent|quer|pointer|scale|(^|_)(A_log|D)$"
)
"""Parameters that are no linear map whatever their shape: class tokens, ``A_log`` of Mamba."""

EXPERTS = re.compile(r"experts$|^(input|output)_linear$")
"""Modules that hold a stack of matrices, one linear map per expert."""


def kind_for(name: str | None, shape: Sequence[int], vocabulary_axis: int | None) -> Kind:
    """Return the kind of a weight of this name and shape.

    Args:
        name: the weight's name in the checkpoint, or ``None`` where the host has none.
        shape: its shape; a matrix is one linear map, a stack of experts one for each.
        vocabulary_axis: the axis that is indexed by token where the host knows one.
    """
    *owners, parameter = (name or "").split(".")
    owner = next((part for part in reversed(owners) if not part.isdigit()), "")
    if vocabulary_axis is not None:
        return Kind.TABLE
    if NORMALISATION.search(owner) or (parameter == "weight" and len(shape) == 1):
        return Kind.NORMALISATION
    if VECTOR.search(parameter):
        return Kind.VECTOR
    if TABLE.search(owner) and not PROJECTION.search(owner):
        return Kind.TABLE
    if len(shape) == 2 or (len(shape) == 3 and EXPERTS.search(owner)):
        return Kind.LINEAR
    return Kind.VECTOR
