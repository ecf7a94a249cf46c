"""Write a trained base and its specialists as ordinary Hugging Face checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_stf.demo.training import (
    Advance,
    Settings,
    no_progress,
    torch_threads,
    train_base,
    train_specialist,
)


def build_models(
    directory: Path, settings: Settings, seed: int = 0, advance: Advance = no_progress
) -> dict[str, Path]:
    """Train a base and one specialist for each kind of text and write them under ``directory``.

    Args:
        directory: gets one subdirectory for each model, ``base`` and the names of the kinds; made
            if missing.
        settings: sizes and kinds; ``Settings.tiny()`` takes seconds.
        seed: of the initial weights and of the order of the text; the same seed on the same machine
            gives the same bytes.
        advance: called after each optimiser step with the name of the model in training.

    Returns:
        The path of each checkpoint by name, the base first.

    Raises:
        STFError: this Python does not carry the text of one of the kinds.
    """
    with torch_threads(settings.threads):
        base = train_base(settings, seed, advance)
        paths = {"base": save_model(base, directory / "base")}
        for kind in settings.kinds:
            specialist = train_specialist(base, kind, settings, seed, advance)
            paths[kind] = save_model(specialist, directory / kind)
    return paths


def save_model(model: LlamaForCausalLM, path: Path) -> Path:
    """Write weights, configuration and tokenizer; the directory appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    byte_tokenizer().save_pretrained(partial)
    os.replace(partial, path)
    return path


def load_model(path: Path) -> LlamaForCausalLM:
    """Read a checkpoint back in float32, ready to be measured."""
    return LlamaForCausalLM.from_pretrained(path, dtype="float32").eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are the bytes of UTF-8, and one end-of-text mark after them."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def _byte_letters() -> dict[str, int]:
    """Return the letter by which ``tokenizers`` writes each byte: itself, or if hidden 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return {letters[byte]: byte for byte in range(256)}
