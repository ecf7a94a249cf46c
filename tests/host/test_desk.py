"""The desk: what it remembers of a merge, and what it leaves as it was."""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_tensors

from mergekit_stf.core import Merged, methods
from mergekit_stf.core.methods.stf import SuperposeFeatures
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.diagnostics.records import Recorder
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.plugin.method import HostMethod, host_method
from mergekit_stf.host.store.store import Store
from tests.host.jobs import contradicting, job_of, three


def test_a_record_and_its_warning_come_from_the_store_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, read = job_of(contradicting()), []
    for name in ("first", "second"):
        with contextlib.closing(Recorder(tmp_path / name)) as recorder:
            desk = Desk(Store(tmp_path / "store"), recorder)
            desk.run(job)
        assert desk.notices.summary() == "1 weights were ill-posed and damped: a and b (1 weights)"
        (record,) = diagnostics.read_records(recorder.path)
        read.append(replace(record, seconds=0.0, peak_rss=None))
    assert desk.store is not None
    assert desk.store.hits == 1
    assert read[0] == read[1]
    assert read[0].cutoff
    assert caplog.text.count("layer.0.weight: a and b ask for contradicting") == 2


def test_a_merge_says_a_warning_once_and_the_next_one_says_it_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, tuned = torch.zeros(4, 4), torch.eye(4)
    for merge in range(1, 3):
        with host_method("stf").at(Desk()), caplog.at_level(logging.WARNING):
            for _ in range(3):
                merge_tensors([base, tuned], "stf", base_index=0, parameters={"rescale": True})
        assert caplog.text.count("stf has no use for `rescale: True`") == merge


def test_every_thread_computes_in_full_precision_and_the_switch_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    inside = threading.Barrier(2, timeout=60)
    merge = SuperposeFeatures.merge

    def watching(*arguments: Any) -> Merged:
        inside.wait()
        found = merge(*arguments)
        seen.append(torch.get_float32_matmul_precision())
        return found

    monkeypatch.setattr(SuperposeFeatures, "merge", watching)
    torch.set_float32_matmul_precision("high")
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Desk().run, [job_of(three()), job_of(three(1))]))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest", "highest"]


def test_the_desk_of_a_merge_takes_the_place_of_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_STF_STORE", str(tmp_path / "named"))
    method, desk = HostMethod(methods.get("stf")), Desk()
    named = method.desk
    assert named.store is not None
    assert named.store.folder == tmp_path / "named"
    with method.at(desk):
        assert method.desk is desk
    assert method.desk is named
