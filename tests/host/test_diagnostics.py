from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergekit_stf.core import superpose
from mergekit_stf.core.errors import STFError
from mergekit_stf.core.features import spectrum_ranks
from mergekit_stf.host.diagnostics import records as diagnostics
from tests.environments import ROOT

CPU = torch.device("cpu")


def matrices(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randn(24, 16, generator=generator) for _ in range(3))
    return [first, second + first / 2, third]


def report(seed: int = 0) -> Report:
    return superpose(matrices(seed)).report


def record_one(
    path: Path,
    reports: list[Report],
    rule: str = "superpose",
    models: tuple[str, ...] = ("a", "b", "c"),
) -> diagnostics.Record:
    with diagnostics.recording(path) as recorder:
        recorder.record(
            name="layer.0.weight",
            rule=rule,
            shape=(24, 16),
            models=models,
            seconds=0.5,
            device=CPU,
            reports=reports,
        )
    (record,) = diagnostics.read(path)
    return record


def close(found: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found).double(), expected, rtol=1e-5, atol=1e-5)


def test_lengths_and_interference_match_a_float64_computation(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", [report()])
    flat = torch.stack([m.double().flatten() for m in matrices()])
    length = flat.norm(dim=1)
    for row, expected in zip(record.cosine, (flat @ flat.T) / length.outer(length), strict=True):
        close(row, expected)
    close(record.norms, length)
    assert record.norm_sum == pytest.approx(flat.sum(0).norm().item(), rel=1e-5)
    assert record.norm_merged == pytest.approx(superpose(matrices()).M.norm().item(), rel=1e-5)


def test_records_have_one_order_of_models_whatever_the_method_merges_in(tmp_path: Path) -> None:
    first = record_one(tmp_path / "first.jsonl", [report()])
    turned = superpose([matrices()[k] for k in (2, 0, 1)]).report
    other = record_one(tmp_path / "other.jsonl", [turned], models=("c", "a", "b"))
    assert other.models == first.models
    assert other.norms == pytest.approx(first.norms, rel=1e-5)
    for row, expected in zip(other.cosine, first.cosine, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    for row, expected in zip(other.spectra, first.spectra, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_a_stack_counts_as_one_matrix(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", [report(0), report(1)])
    pairs = zip(matrices(0), matrices(1), strict=True)
    flat = torch.stack([torch.cat(pair).double().flatten() for pair in pairs])
    length = flat.norm(dim=1)
    for row, expected in zip(record.cosine, (flat @ flat.T) / length.outer(length), strict=True):
        close(row, expected)
    close(record.norms, length)
    assert record.norm_sum == pytest.approx(flat.sum(0).norm().item(), rel=1e-5)
    assert record.kept == [32, 32, 32]


def test_a_stack_tells_of_its_worst_matrix(tmp_path: Path) -> None:
    harder = replace(report(), condition=50.0, iterations=30, residual=1e-3, converged=False)
    record = record_one(tmp_path / "d.jsonl", [report(), harder])
    assert (record.condition, record.iterations) == (50.0, 30)
    assert (record.residual, record.converged) == (1e-3, False)


def test_a_stack_tells_of_a_matrix_that_was_solved_in_bfloat16(tmp_path: Path) -> None:
    rough = replace(report(), precision="bfloat16")
    for reports in ([report(), rough], [rough, report()]):
        assert record_one(tmp_path / "d.jsonl", reports).precision == "bfloat16"
    assert record_one(tmp_path / "d.jsonl", [report(), report()]).precision == "full"


def test_the_solve_is_described(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", [report()])
    assert record.kept == [16, 16, 16]
    assert record.residual is not None
    assert record.residual < 1e-6
    s = torch.linalg.svdvals(matrices()[1].double())
    close(record.spectra[1], s[torch.tensor(spectrum_ranks(16)) - 1])
    assert record.alpha_ratio == sorted(record.alpha_ratio)
    assert record.alpha_ratio[0] < 1 < record.alpha_ratio[-1]


def test_a_zero_task_matrix_has_no_direction(tmp_path: Path) -> None:
    a, b, _ = matrices()
    record = record_one(tmp_path / "d.jsonl", [superpose([a, torch.zeros_like(a), b]).report])
    assert record.norms[1] == 0
    assert record.cosine[1] == [0, 0, 0]
    assert record.spectra[1] == []


def test_an_infinite_condition_survives_the_file(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", [replace(report(), condition=math.inf)])
    assert record.condition == math.inf


def test_lines_are_json_and_leave_out_what_a_rule_has_not(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    record_one(path, [], rule="sum")
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["rule"] == "sum"
    assert "condition" not in line


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"

    def work(recorder: diagnostics.Recorder, number: int) -> None:
        for index in range(20):
            recorder.record(
                name=f"{number}.{index}",
                rule="sum",
                shape=(1,),
                models=["a", "b", "c"],
                seconds=0.0,
                device=CPU,
            )

    with diagnostics.recording(path) as recorder:
        threads = [threading.Thread(target=work, args=(recorder, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({record.name for record in diagnostics.read(path)}) == 80


def test_nobody_listens_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(diagnostics.VARIABLE, raising=False)
    assert diagnostics.active() is None
    with diagnostics.recording(tmp_path / "d.jsonl") as recorder:
        assert diagnostics.active() is recorder
    assert diagnostics.active() is None


def test_the_environment_switches_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "d.jsonl"
    monkeypatch.setenv(diagnostics.VARIABLE, str(path))
    first, second = diagnostics.active(), diagnostics.active()
    assert first is second
    assert first is not None
    assert first.path == path
    assert path.exists()
    first.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(STFError, match="cannot write diagnostics to"),
        diagnostics.recording(tmp_path),
    ):
        pytest.fail("not reached")


@pytest.mark.parametrize("text", ["{}\n", "not json\n", '{"name": "x"}\n'])
def test_a_damaged_file_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "d.jsonl"
    record_one(path, [report()])
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    with pytest.raises(STFError, match="line 2 is not a record"):
        diagnostics.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(STFError, match=r"nothing\.jsonl: cannot be read: No such file"):
        diagnostics.read(tmp_path / "nothing.jsonl")


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "tools.md").read_text("utf-8")
    table = page.split("## Diagnostics")[1].split("## ")[0]
    rows = re.findall(r"^\| (`.+`) \|", table, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set(
        diagnostics.Record.model_fields
    )


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
    (record,) = diagnostics.read(write_raw(tmp_path / "d.jsonl", GOOD))
    assert record.models == ["a\u2028", "b"]


def test_a_merge_without_differences_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    assert diagnostics.read(tmp_path / "d.jsonl") == []


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
        diagnostics.read(path)


@pytest.mark.parametrize("content", [b"\xff", b'{"name": "\xc3("}', b"\xff\xfe{\x00}\x00"])
def test_records_that_are_no_utf_8(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(STFError, match=r"d\.jsonl: cannot be read: not UTF-8 text"):
        diagnostics.read(tmp_path / "d.jsonl")
