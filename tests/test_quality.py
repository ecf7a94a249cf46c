"""The bench of specialists: its arithmetic on a base of two weights, whose answers are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.__main__ import candidates
from benchmarks.quality.candidates import Candidate, Change
from benchmarks.quality.leads import LEADS, Lead
from benchmarks.quality.study import Case, Score, Size, Study
from benchmarks.quality.table import written
from benchmarks.quality.tasks import Task, balanced, split
from mergekit_stf.core import LowRank, methods

NAMES = ("left", "right")


class Inputs:
    """Task i asks for the response of its own weights to its own four inputs."""

    name = "toy"
    seeds = 1
    size = Size(2, 0, 0, 0.0, 4, 4, 4)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = {"layer.weight": torch.randn(6, 8), "norm.weight": torch.ones(8)}
        self.changes = [torch.zeros(6, 8), torch.zeros(6, 8)]
        self.changes[0][:, :4], self.changes[1][:, 4:] = torch.randn(6, 4), torch.randn(6, 4)

    def train(self, task, seed, adapter=False):
        change = self.changes[NAMES.index(task.name)]
        if adapter:
            return {"layer.weight": LowRank(change, torch.eye(8))}
        return self.base | {"layer.weight": self.base["layer.weight"] + change}

    def score(self, weights, tasks, split):
        return [self._score(weights, NAMES.index(task.name)) for task in tasks]

    def _score(self, weights, index):
        wanted = self.base["layer.weight"] + self.changes[index]
        away = (weights["layer.weight"] - wanted)[:, 4 * index : 4 * index + 4].norm(dim=0)
        return Score(float((away < 1e-3).float().mean()), float(away.square().mean()))


def studied(wanted, **case):
    kept = []
    tasks = [Task(name, "toy", [], [], []) for name in NAMES]
    study = Study(Inputs(), tasks, 0, kept.append)
    study.measure(Case("all", NAMES, **case), wanted)
    return study.figures, kept


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_kept_is_a_share_of_the_specialists(adapters):
    wanted = [
        Candidate("sum", "task_arithmetic"),
        Candidate("mean", "task_arithmetic", {"normalize": True}, scales=()),
        Candidate("wudi", "wudi"),
    ]
    figures, kept = studied(wanted, adapters=adapters)
    found = figures["cases"]["all"]["methods"]
    assert found["sum"]["default"]["kept"] == 1
    assert found["sum"]["best"]["lambda"] == 1
    assert found["sum"]["default"]["gain"] == pytest.approx(1, abs=1e-6)
    assert found["wudi"]["default"]["kept"] == 1
    # Half of each difference is left: no response is right, three quarters of the loss are gone.
    assert found["mean"]["default"]["kept"] == 0
    assert found["mean"]["default"]["gain"] == pytest.approx(0.75, abs=1e-6)
    assert [point["lambda"] for point in found["mean"]["grid"]] == []
    assert len(kept) == len(NAMES) + len(wanted)


def test_every_candidate_and_lead_merges(monkeypatch):
    monkeypatch.setitem(methods._METHODS, Lead.name, Lead())  # for the time of this test
    figures, _ = studied([*candidates(), *LEADS])
    found = figures["cases"]["all"]["methods"]
    assert set(found) == {one.label for one in (*candidates(), *LEADS)}
    assert not [label for label, entry in found.items() if "error" in entry]
    machine = {"card": None, "processor": "a processor"}
    size = {"name": "toy"}
    table = written(
        {"bench": "toy", "size": size, "machine": machine, "seconds": 1.0, "runs": [figures]}
    )
    assert "| wudi | 1 | 100.0 |" in table
    assert all(f"| {label} |" in table for label in found)


def test_a_candidate_that_cannot_merge_is_kept_as_an_error():
    figures, _ = studied([Candidate("odd", "consensus_ta", {"agreeing": 9})])
    assert "agreeing" in figures["cases"]["all"]["methods"]["odd"]["error"]


def test_the_factor_of_a_kind_and_of_a_depth_scale_the_difference():
    base = {f"layers.{i}.mlp.weight": torch.zeros(4, 4) for i in range(3)}
    tuned = {name: torch.eye(4) for name in base}
    change = Change(base, [tuned])
    found = change.by(Candidate("depth", "wudi", depth=(0.5, 1.5)))(1.0)
    assert [round(float(found[name][0, 0]), 4) for name in base] == [0.5, 1.0, 1.5]


def test_splits_share_no_example_and_do_not_depend_on_the_order():
    pairs = [(str(i), str(i % 2)) for i in range(2000)]
    one, other = split("a", "toy", pairs), split("a", "toy", reversed(pairs))
    assert one == other
    parts = [{text for text, _ in part} for part in (one.train, one.validation, one.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 2000
    assert len(list(balanced(pairs, 100))) == 200


def test_the_free_variant_is_wudi_at_its_defaults(monkeypatch):
    monkeypatch.setitem(methods._METHODS, Lead.name, Lead())
    toy = Inputs()
    change = Change(toy.base, [toy.train(Task(name, "", [], [], []), 0) for name in NAMES])
    lead, wudi = (change.by(Candidate(name, name))(1.0) for name in (Lead.name, "wudi"))
    torch.testing.assert_close(lead["layer.weight"], wudi["layer.weight"])
