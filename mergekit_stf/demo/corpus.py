"""Text that every Python installation carries, as tokens, in disjoint parts."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Literal

import torch

from mergekit_stf.core.errors import STFError
from mergekit_stf.demo.texts import KINDS, library

Split = Literal["train", "validation", "test"]

END_OF_TEXT = 256
VOCABULARY = 257

_LONGEST_DOCUMENT = 24_000
_EIGHTHS: list[Split] = ["test", "validation", "train", "train", "train", "train", "train", "train"]
_SPLITS: dict[Split, int] = {"train": 600_000, "validation": 60_000, "test": 60_000}


def encode(text: str) -> torch.Tensor:
    """Return the UTF-8 bytes of a text as token ids, shape ``(bytes,)``."""
    return torch.frombuffer(bytearray(text.encode("utf-8", "replace")), dtype=torch.uint8).long()


@cache
def corpus(kind: str) -> dict[Split, torch.Tensor]:
    """Return the tokens of one kind of text for each split.

    Documents go to a split by a hash of their source (so a source file is in the same split for
    every kind computed from it), and a block of text whose words were seen before, in whatever
    split, is left out: no block stands in two splits.

    Raises:
        STFError: the installation does not carry this kind of text.
    """
    return {
        split: torch.cat([torch.cat([encode(t), torch.tensor([END_OF_TEXT])]) for t in texts])
        for split, texts in split_documents(kind).items()
    }


def split_documents(kind: str) -> dict[Split, list[str]]:
    """Return the documents of one kind for each split, in a fixed order that looks shuffled."""
    if kind not in KINDS:
        raise STFError(f"no kind of text is called {kind!r}: choose from {', '.join(KINDS)}")
    documents = sorted(KINDS[kind](), key=lambda document: _digest(document[0]))
    seen: set[str] = set()
    parts: dict[Split, list[str]] = {split: [] for split in _SPLITS}
    room = dict(_SPLITS)
    for key, blocks in documents:
        split = _split_of(key)
        text = _new_text(blocks(), seen) if room[split] > 0 else ""
        if text:
            parts[split].append(text)
            room[split] -= len(text)
    for split, texts in parts.items():
        if not texts:
            raise STFError(
                f"this Python carries too little {kind} text for the {split} split (looked in "
                f"{library()}): run the demo with a full CPython 3.10 to 3.13"
            )
    return parts


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _split_of(key: str) -> Split:
    return _EIGHTHS[_digest(key) % 8]


def _new_text(blocks: list[str], seen: set[str]) -> str:
    kept: list[str] = []
    length = 0
    for block in blocks:
        words = " ".join(block.split())
        if words and words not in seen and length < _LONGEST_DOCUMENT:
            kept.append(block)
            seen.add(words)
            length += len(block)
    return "\n".join(kept)
