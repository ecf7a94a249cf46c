"""Train a tiny byte-level Llama and specialists of it, and measure models on held-out text."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_stf.demo.corpus import END_OF_TEXT, VOCABULARY, Split, corpus
from mergekit_stf.demo.texts import KINDS

Advance = Callable[[str, int], None]
"""Called with what is being done and how many steps of it were just done."""


@dataclass(frozen=True)
class Settings:
    """Size of the models, length of the training, kinds of text.

    Attributes:
        kinds: of text, one specialist each.
        background: kinds on which the base is trained in equal parts.
        rehearsal: one row in so many of a specialist's text is background, so that it forgets
            less of what the base knew; 0 is none.
        hidden, layers, heads, context: of the Llama.
        batch: rows of ``context + 1`` bytes a step.
        base_steps, specialist_steps: optimiser steps.
        base_rate, specialist_rate: highest learning rates.
        windows: of held-out text that a loss is measured on.
        threads: of torch, while training and measuring; two threads gain little on matrices this
            small, and lose much when another program wants the second core.
    """

    kinds: tuple[str, ...] = ("python", "prose", "unicode")
    background: tuple[str, ...] = tuple(KINDS)
    rehearsal: int = 2
    hidden: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 128
    batch: int = 16
    base_steps: int = 300
    specialist_steps: int = 60
    base_rate: float = 6e-3
    specialist_rate: float = 6e-4
    windows: int = 96
    threads: int = 1

    @classmethod
    def tiny(cls, kinds: tuple[str, ...] = ("python", "prose", "unicode")) -> Settings:
        """Return settings that train a base and its specialists in a few seconds, for tests."""
        return cls(
            kinds=kinds, hidden=32, layers=2, heads=2, context=64, batch=8, base_steps=60,
            specialist_steps=40, base_rate=3e-3, specialist_rate=3e-3, windows=32,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Number of optimiser steps of all models together."""
        return self.base_steps + len(self.kinds) * self.specialist_steps


def no_progress(label: str, steps: int) -> None:
    """Take a step of work without showing it."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads meanwhile: sums depend on it, and small models wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Return an untrained float32 Llama whose tokens are the 256 bytes and an end-of-text mark."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def rows_for_base(settings: Settings) -> Iterator[str]:
    """Yield the kind of each row of the base's text."""
    return itertools.cycle(settings.background)


def rows_for_specialist(kind: str, settings: Settings) -> Iterator[str]:
    """Yield the kind of each row of a specialist's text: its own, now and then background."""
    background = rows_for_base(settings)
    if not settings.rehearsal:
        yield from itertools.repeat(kind)
    while True:
        yield from [kind] * (settings.rehearsal - 1)
        yield next(background)


def batches(
    kinds: Iterator[str], settings: Settings, steps: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of training windows, of ``(batch, context + 1)``, a row a kind."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(settings.context + 1)
    for _ in range(steps):
        rows = []
        for kind in itertools.islice(kinds, settings.batch):
            text = corpus(kind)["train"]
            start = torch.randint(len(text) - settings.context, (1,), generator=generator)
            rows.append(text[start + offsets])
        yield torch.stack(rows)


def next_byte_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats of each token given those before it in its row."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    steps: int,
    rate: float,
    advance: Callable[[], None],
) -> None:
    """Fit a model in place: AdamW, a warm-up of a tenth of the steps, then a cosine decay."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 10)
    model.train()
    for step, tokens in enumerate(data):
        progress = max(0.0, (step - warm_up) / (steps - warm_up))
        scale = min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate * scale
        loss = next_byte_loss(model, tokens)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        advance()
    model.eval()


def train_base(settings: Settings, seed: int, advance: Advance = no_progress) -> LlamaForCausalLM:
    """Train the base on equal parts of its kinds of text."""
    model = new_model(settings, seed)
    data = batches(rows_for_base(settings), settings, settings.base_steps, seed)
    train(model, data, settings.base_steps, settings.base_rate, lambda: advance("base", 1))
    return model


def train_specialist(
    base: LlamaForCausalLM,
    kind: str,
    settings: Settings,
    seed: int,
    advance: Advance = no_progress,
) -> LlamaForCausalLM:
    """Fine-tune a copy of the base on one kind of text, with some background."""
    model = copy.deepcopy(base)
    steps = settings.specialist_steps
    rows = rows_for_specialist(kind, settings)
    data = batches(rows, settings, steps, seed + 1 + settings.kinds.index(kind))
    train(model, data, steps, settings.specialist_rate, lambda: advance(kind, 1))
    return model


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, kind: str, settings: Settings, split: Split = "test"
) -> float:
    """Return the loss on held-out text of one kind, in bits per byte.

    The text is cut into at most ``settings.windows`` windows, evenly spread and disjoint; a byte is
    predicted from those before it in its window.
    """
    text = corpus(kind)[split]
    width = settings.context + 1
    available = len(text) // width
    count = min(settings.windows, available)
    rows = torch.arange(count) * available // count
    tokens = text[: available * width].view(available, width)[rows]
    losses = [next_byte_loss(model, part) * len(part) for part in torch.split(tokens, 32)]
    return float(torch.stack(losses).sum()) / count / math.log(2)
