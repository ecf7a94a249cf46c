from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from mergekit_stf.core import Record, superpose
from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features import spectrum_ranks
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.diagnostics import records as diagnostics
from mergekit_stf.host.diagnostics.records import Recorder
from mergekit_stf.host.merging.desk import Desk, desk_of_environment
from mergekit_stf.host.merging.job import WeightJob
from mergekit_stf.host.merging.records import join_records
from tests.environments import ROOT
from tests.host.jobs import job_of, three


def record_of(path: Path, job: WeightJob) -> Record:
    """Merge a weight at a desk that writes records, and read what it wrote."""
    with contextlib.closing(Recorder(path)) as recorder:
        Desk(recorder=recorder).run(job)
    (record,) = diagnostics.read_records(path)
    return record


def written(path: Path, *records: Record) -> list[Record]:
    with contextlib.closing(Recorder(path)) as recorder:
        for record in records:
            recorder.write(record)
    return diagnostics.read_records(path)


def close(found: tuple[float, ...], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=1e-5, atol=1e-5)


def check_lengths(record: Record, flat: torch.Tensor) -> None:
    """Compare lengths and cosines with those of the task matrices, one a row, in float64."""
    length = flat.norm(dim=1)
    for row, expected in zip(record.cosine, (flat @ flat.T) / length.outer(length), strict=True):
        close(row, expected)
    close(record.norms, length)
    assert record.norm_sum == pytest.approx(flat.sum(0).norm().item(), rel=1e-5)


def test_lengths_and_interference_match_a_float64_computation(tmp_path: Path) -> None:
    record = record_of(tmp_path / "d.jsonl", job_of(three()))
    check_lengths(record, torch.stack([m.double().flatten() for m in three()]))
    assert record.norm_merged == pytest.approx(superpose(three()).M.norm().item(), rel=1e-5)


def test_a_record_tells_which_weight_was_merged_how(tmp_path: Path) -> None:
    record = record_of(tmp_path / "d.jsonl", job_of(three()))
    assert (record.name, record.method, record.rule) == ("layer.0.weight", "stf", "superpose")
    assert (record.shape, record.models) == ((24, 16), ("a", "b", "c"))
    assert record.seconds > 0
    assert record.peak_rss


def test_records_have_one_order_of_models_whatever_the_method_merges_in(tmp_path: Path) -> None:
    first = record_of(tmp_path / "first.jsonl", job_of(three()))
    turned = job_of([three()[k] for k in (2, 0, 1)], models="cab")
    other = record_of(tmp_path / "other.jsonl", turned)
    assert other.models == first.models == ("a", "b", "c")
    assert other.norms == pytest.approx(first.norms, rel=1e-5)
    for row, expected in zip(other.cosine, first.cosine, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    for row, expected in zip(other.spectra, first.spectra, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_stack_counts_as_one_matrix(tmp_path: Path) -> None:
    stacks = [torch.stack(pair) for pair in zip(three(0), three(1), strict=True)]
    record = record_of(tmp_path / "d.jsonl", job_of(stacks, name="experts.down_proj"))
    check_lengths(record, torch.stack([stack.double().flatten() for stack in stacks]))
    assert record.kept == (32, 32, 32)


def test_a_stack_tells_of_its_worst_matrix() -> None:
    one = superpose(three()).record
    harder = replace(one, condition=50.0, iterations=30, residual=1e-3, converged=False)
    for records in ([one, harder], [harder, one]):
        record = join_records(records)
        assert (record.condition, record.iterations) == (50.0, 30)
        assert (record.residual, record.converged) == (1e-3, False)


def test_the_solve_is_described(tmp_path: Path) -> None:
    record = record_of(tmp_path / "d.jsonl", job_of(three()))
    assert record.kept == (16, 16, 16)
    assert record.residual is not None
    assert record.residual < 1e-6
    s = torch.linalg.svdvals(three()[1].double())
    close(record.spectra[1], s[torch.tensor(spectrum_ranks(16)) - 1])
    assert record.alpha_ratio == tuple(sorted(record.alpha_ratio))
    assert record.alpha_ratio[0] < 1 < record.alpha_ratio[-1]


def test_a_zero_task_matrix_has_no_direction(tmp_path: Path) -> None:
    a, b, _ = three()
    record = record_of(tmp_path / "d.jsonl", job_of([a, torch.zeros_like(a), b]))
    assert record.norms[1] == 0
    assert record.cosine[1] == (0, 0, 0)
    assert record.spectra[1] == ()


def test_a_weight_in_which_no_model_differs_has_no_record(tmp_path: Path) -> None:
    with contextlib.closing(Recorder(tmp_path / "d.jsonl")) as recorder:
        Desk(recorder=recorder).run(job_of([torch.zeros(24, 16)] * 2))
    assert diagnostics.read_records(recorder.path) == []


def test_an_infinite_condition_survives_the_file(tmp_path: Path) -> None:
    whole = record_of(tmp_path / "whole.jsonl", job_of(three()))
    (record,) = written(tmp_path / "d.jsonl", replace(whole, condition=math.inf))
    assert record.condition == math.inf


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    record = record_of(tmp_path / "whole.jsonl", job_of(three()))
    record = replace(record, facts={"of a method": 0.5})
    (again,) = written(tmp_path / "d.jsonl", record)
    assert again == record


def test_lines_are_json_and_leave_out_what_a_rule_has_not(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    record_of(path, job_of(three(), kind=Kind.TABLE))
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["rule"] == "sum"
    assert "condition" not in line


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    def work(desk: Desk, number: int) -> None:
        for index in range(20):
            desk.run(job_of(three(), name=f"{number}.{index}", rule="sum"))

    with contextlib.closing(Recorder(tmp_path / "d.jsonl")) as recorder:
        desk = Desk(recorder=recorder)
        threads = [threading.Thread(target=work, args=(desk, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({record.name for record in diagnostics.read_records(recorder.path)}) == 80


def test_nothing_is_written_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(diagnostics.VARIABLE, raising=False)
    assert desk_of_environment().recorder is None


def test_the_environment_switches_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "d.jsonl"
    monkeypatch.setenv(diagnostics.VARIABLE, str(path))
    desk = desk_of_environment()
    desk.run(job_of(three()))
    assert desk.recorder is not None
    desk.recorder.close()
    assert [record.name for record in diagnostics.read_records(path)] == ["layer.0.weight"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(STFError, match="cannot write diagnostics to"):
        Recorder(tmp_path)


@pytest.mark.parametrize("text", ["{}\n", "not json\n", '{"name": "x"}\n'])
def test_a_damaged_file_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.jsonl"
    record_of(path, job_of(three()))
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    with pytest.raises(STFError, match="line 2 is not a record"):
        diagnostics.read_records(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(STFError, match=r"nothing\.jsonl: cannot be read: No such file"):
        diagnostics.read_records(tmp_path / "nothing.jsonl")


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "tools.md").read_text("utf-8")
    table = page.split("## Diagnostics")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.+`) \|", table, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == {
        field.name for field in fields(Record)
    }


GOOD: dict[str, object] = {
    "name": "w",
    "rule": "superpose",
    "shape": [2, 2],
    "models": ["a\u2028", "b"],
    "seconds": 0.1,
    "routes": ["svd", "svd"],
    "norms": [1.0, 1.0],
    "cosine": [[1.0, 0.0], [0.0, 1.0]],
}


def write_raw(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def test_a_separator_of_lines_in_a_name_is_no_line(tmp_path: Path) -> None:
    (record,) = diagnostics.read_records(write_raw(tmp_path / "d.jsonl", GOOD))
    assert record.models == ("a\u2028", "b")


def test_a_merge_without_differences_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    assert diagnostics.read_records(tmp_path / "d.jsonl") == []


@pytest.mark.parametrize(
    "change",
    [
        {"cosine": [[1.0]]},
        {"cosine": []},
        {"cosine": [[], []]},
        {"norms": [1.0]},
        {"norms": []},
        {"routes": ["svd"]},
        {"spectra": [[1.0]]},
        {"kept": [1, 2, 3]},
        {"alpha_ratio": [1.0]},
        {"shape": [-1, 2]},
        {"models": []},
    ],
    ids=str,
)
def test_records_that_contradict_themselves_are_damaged(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = write_raw(tmp_path / "d.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(STFError, match="line 2 is not a record of a merge"):
        diagnostics.read_records(path)


@pytest.mark.parametrize("content", [b"\xff", b'{"name": "\xc3("}', b"\xff\xfe{\x00}\x00"])
def test_records_that_are_no_utf_8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(STFError, match=r"d\.jsonl: cannot be read: not UTF-8 text"):
        diagnostics.read_records(tmp_path / "d.jsonl")
