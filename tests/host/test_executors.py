"""What a merge on a cluster is made of, without one: packing, waiting, schedules, refusals."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_stf.core import STFError
from mergekit_stf.core.record import Record
from mergekit_stf.host.checkpoints.content import same_bits
from mergekit_stf.host.executors.carried import CarriedStore, InStore
from mergekit_stf.host.executors.jobs import share_of_card
from mergekit_stf.host.executors.messages import Entry, Order, Packed
from mergekit_stf.host.executors.nodes import check_node, expected_of
from mergekit_stf.host.executors.spool import Spool
from mergekit_stf.host.planning.schedule import schedule_length
from mergekit_stf.report.timeline import arrange
from tests.host.models import save_family


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
def test_a_packed_tensor_keeps_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    found = pickle.loads(pickle.dumps(Packed.of(x.mT if x.ndim > 1 else x))).tensor()
    assert found.dtype == dtype
    assert same_bits(found, x.mT if x.ndim > 1 else x)
    found.zero_()  # in memory of its own


def test_the_spool_gives_back_in_any_order_and_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "waiting", memory=100)
    tensors = {str(n): torch.full((10,), float(n)) for n in range(6)}
    for name, tensor in tensors.items():
        spool.put(name, tensor)
    spool.put("absent", None)
    assert len(list((tmp_path / "waiting").iterdir())) == 4  # of 40 bytes two fit into memory
    for name in reversed(tensors):
        found = spool.take(name)
        assert found is not None
        assert torch.equal(found, tensors[name])
    assert spool.take("absent") is None
    assert not list((tmp_path / "waiting").iterdir())
    spool.put("again", torch.ones(25))  # memory is free again
    assert not list((tmp_path / "waiting").iterdir())
    spool.close()
    assert not (tmp_path / "waiting").exists()


def test_who_waits_for_a_weight_gets_it_or_the_error(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    threading.Timer(0.05, spool.put, ("a", torch.ones(2))).start()
    assert torch.equal(spool.take("a"), torch.ones(2))  # type: ignore[arg-type]
    threading.Timer(0.05, spool.fail, (STFError("b is broken"),)).start()
    with pytest.raises(STFError, match="b is broken"):
        spool.take("b")


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=30), st.integers(1, 8))
@settings(deadline=None)
def test_a_schedule_lies_between_its_bounds(seconds: list[float], places: int) -> None:
    """Graham's bound of list scheduling."""
    found, total, longest = schedule_length(seconds, places), sum(seconds), max(seconds)
    least = max(total / places, longest)
    assert least * (1 - 1e-9) <= found <= (2 - 1 / places) * least * (1 + 1e-9)
    assert schedule_length(seconds, 1) == pytest.approx(total)


def test_a_card_is_shared_in_quarters() -> None:
    card = torch.device("cuda")
    found = [share_of_card(card, needed, 100) for needed in (0, 1, 25, 26, 60, 76, 100, 500)]
    assert found == [0.25, 0.25, 0.25, 0.5, 0.75, 1, 1, 1]
    assert share_of_card(torch.device("cpu"), 60, 0) == 0


def test_a_file_that_differs_is_named_with_its_node(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path, tasks=1, layout="sharded")
    options, cache = MergeOptions(), LoaderCache()
    cache.setup(options)
    references = [ModelReference.parse(str(path)) for path in (models.base, models.tuned[0])]
    expected = pickle.loads(pickle.dumps(expected_of(references)))
    check_node(expected, "gpu7", None)
    shard = sorted(models.tuned[0].glob("*.safetensors"))[1].resolve()
    content = shard.read_bytes()
    shard.write_bytes(content[:9] + content[9:].replace(b"F32", b"I32", 1))
    with pytest.raises(STFError, match=r"^node gpu7: .*tuned1.*safetensors has another header"):
        check_node(expected, "gpu7", None)
    shard.write_bytes(content + b"\0")
    with pytest.raises(STFError, match=rf"has {len(content) + 1} bytes, and {len(content)} where"):
        check_node(expected, "gpu7", None)
    shard.unlink()
    with pytest.raises(STFError, match="every node needs the models at the same path"):
        check_node(expected, "gpu7", None)


def test_the_timeline_gives_weights_at_one_time_places_of_their_own() -> None:
    def record(node: str, started: float, seconds: float) -> Record:
        return Record(node=node, started=started, seconds=seconds)

    rows = arrange([record("a", 5, 2), record("a", 6, 2), record("b", 6, 1), record("a", 7.5, 1)])
    assert rows == {("a", 0): [(0, 2), (2.5, 1)], ("a", 1): [(1, 2)], ("b", 0): [(1, 1)]}


def refuse(matrix: torch.Tensor, note: str) -> str:
    raise ValueError("forged")


def test_a_worker_asks_for_what_the_driver_has_and_merges_what_it_has_lost() -> None:
    task: Any = None
    entry, known = Entry("k", Packed.of(torch.ones(2)), "note"), frozenset({"k"})
    assert CarriedStore(Order(task), known).get("other", refuse) is None
    with pytest.raises(InStore) as asked:
        CarriedStore(Order(task), known).get("k", refuse)
    assert asked.value.key == "k"
    given = CarriedStore(Order(task, given=entry), known)
    assert given.get("k", lambda matrix, note: (matrix.sum().item(), note)) == (2, "note")
    assert given.get("k", refuse) is None
    assert CarriedStore(Order(task, lost="k"), known).get("k", refuse) is None
    for stored in (True, False):
        store = CarriedStore(Order(task, stored=stored), known)
        store.put("new", torch.zeros(3), "n")
        assert [(one.key, one.note) for one in store.entries] == [("new", "n")] * stored


def test_ray_is_imported_only_when_it_is_asked_for() -> None:
    code = "import sys, mergekit_stf.cli.merge, mergekit_stf.cli.plan; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
