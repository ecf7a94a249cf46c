"""A weight is one value: a job is pickled, merged elsewhere, and gives the same bytes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_stf.core import LowRank
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.checkpoints.stored import StoredTensor
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.merging.job import Task, WeightJob, WeightResult, merge_weight
from mergekit_stf.host.merging.split import parse_split
from mergekit_stf.host.store.store import Store
from tests.host.models import save_family

ELSEWHERE = """
import pickle, sys, torch
torch.set_num_threads(int(sys.argv[3]))
with open(sys.argv[1], "rb") as file:
    jobs = pickle.load(file)
from mergekit_stf.host.merging.job import merge_weight
with open(sys.argv[2], "wb") as file:
    pickle.dump({name: merge_weight(job) for name, job in jobs.items()}, file)
"""
OPTIONS = {"rank": 1.0, "ridge": "auto"}


def noise(*shape: int, seed: int, scale: float = 0.02) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(name: str, base: Tensor, kind: Kind = Kind.LINEAR, **more: Any) -> WeightJob:
    """Return the merge of three tensors near the base, one of them weighted and trimmed."""
    tuned = [base + noise(*base.shape, seed=seed).to(base.dtype) for seed in (1, 2, 3)]
    tasks = (
        Task("a", tuned=tuned[0]),
        Task("b", tuned=tuned[1], weight=0.5, density=0.4),
        Task("c", tuned=tuned[2]),
    )
    return WeightJob(name, kind, base, tasks, "stf", OPTIONS, scale=0.8, **more)


def up_projection() -> WeightJob:
    return dense("model.layers.0.mlp.up_proj.weight", noise(96, 64, seed=0))


def fused() -> WeightJob:
    name, base = "model.layers.0.self_attn.qkv_proj.weight", noise(48, 32, seed=0).bfloat16()
    return dense(name, base, split=parse_split("rows 32,8,8"), out_dtype=torch.float32)


def experts() -> WeightJob:
    return dense("model.layers.0.mlp.experts.down_proj", noise(3, 24, 16, seed=0))


def embedding() -> WeightJob:
    return dense("model.embed_tokens.weight", noise(40, 16, seed=0), Kind.TABLE)


def adapters() -> WeightJob:
    deltas = [LowRank(noise(40, 4, seed=s), noise(4, 24, seed=s + 9, scale=1.0)) for s in (1, 2)]
    tasks = (Task("a", delta=deltas[0], weight=0.5), Task("b", delta=deltas[1]), Task("c"))
    name = "model.layers.0.mlp.gate_proj.weight"
    return WeightJob(name, Kind.LINEAR, noise(40, 24, seed=0), tasks, "stf", OPTIONS, scale=0.8)


def named(folder: Path) -> WeightJob:
    """Return a job whose tensors are those of checkpoints on the disk."""
    models = save_family("llama", folder, tasks=2, dtype=torch.bfloat16, layout="sharded")
    name = "model.layers.1.mlp.down_proj.weight"

    def stored(path: Path) -> StoredTensor:
        model = ModelReference.model_validate(str(path))
        return StoredTensor(model, name, (16, 24), torch.bfloat16)

    base = stored(models.base)
    tasks = tuple(Task(path.name, tuned=stored(path)) for path in models.tuned)
    return WeightJob(name, Kind.LINEAR, base, tasks, "stf", OPTIONS, base_model=base.model)


MADE: tuple[Callable[[], WeightJob], ...] = (up_projection, fused, experts, embedding, adapters)
NAMES = (*(make.__name__ for make in MADE), "named")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WeightJob]:
    found = {make.__name__: make() for make in MADE}
    return found | {"named": named(tmp_path_factory.mktemp("models"))}


@pytest.fixture(scope="module")
def elsewhere(
    jobs: dict[str, WeightJob], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, WeightResult]:
    """What a fresh process makes of the jobs, which it gets as bytes."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    words = [str(folder / "jobs"), str(folder / "results"), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *words], check=True, timeout=300)
    results: dict[str, WeightResult] = pickle.loads((folder / "results").read_bytes())
    return results


def tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a value of ours."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from tensors(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def check_same(result: WeightResult, other: WeightResult) -> None:
    """Compare the bytes, the records but for time and memory, and what is said."""
    assert result.tensor.dtype == other.tensor.dtype
    assert torch.equal(result.tensor, other.tensor)
    records = [
        one.record and replace(one.record, seconds=0.0, peak_rss=None, peak_device=None)
        for one in (result, other)
    ]
    assert records[0] == records[1]
    assert result.notices == other.notices


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_makes_the_same_bytes(
    name: str, jobs: dict[str, WeightJob], elsewhere: dict[str, WeightResult]
) -> None:
    here = merge_weight(jobs[name])
    assert here.tensor.isfinite().all()
    assert here.record is not None
    assert here.record.name == jobs[name].name
    check_same(here, elsewhere[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_desk_makes_the_same_bytes(name: str, jobs: dict[str, WeightJob], tmp_path: Path) -> None:
    here = merge_weight(jobs[name])
    check_same(Desk().run(jobs[name]), here)
    for hits in (0, int(name != "adapters")):  # whose factors are read as quickly as a store is
        store = Store(tmp_path)
        found = Desk(store).run(jobs[name])
        check_same(found, here)
        check_same(pickle.loads(pickle.dumps(found)), here)
        assert store.hits == hits


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_pure(name: str, jobs: dict[str, WeightJob]) -> None:
    job = jobs[name]
    before = [x.clone() for x in tensors(job)]
    first = merge_weight(job)
    kept = first.tensor.clone()
    check_same(merge_weight(job), first)
    assert torch.equal(first.tensor, kept)
    after = list(tensors(job))
    assert len(after) == len(before)
    assert bool(before) is (name != "named")
    assert all(map(torch.equal, before, after))


def test_what_is_not_merged_is_the_base() -> None:
    base = noise(8, 6, seed=0)
    unchanged = WeightJob("x.weight", Kind.LINEAR, base, (Task("a", tuned=base.clone()),), "stf")
    for job in (unchanged, replace(unchanged, rule="base")):
        result = merge_weight(job)
        assert torch.equal(result.tensor, base)
        assert result.record is None
