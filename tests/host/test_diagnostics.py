from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mergekit_stf.core.errors import STFError
from mergekit_stf.host import diagnostics
from mergekit_stf.host.record_numbers import QUANTILES, spectrum_ranks


@dataclass
class Solved:
    route: str
    kept: tuple[int, ...]
    iterations: int
    residual: float
    ridge: float
    condition: float
    s: torch.Tensor
    alpha: torch.Tensor


def matrices(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 16, generator=generator) for _ in range(count)]


def solved(condition: float = 1.5) -> Solved:
    s = torch.cat([torch.linspace(4, 1, 16), torch.linspace(3, 1, 8)])
    return Solved("gram", (16, 8), 7, 1e-7, 0.0, condition, s, s * torch.linspace(0.5, 1.5, 24))


def record_one(path: Path, **changes: object) -> diagnostics.Record:
    deltas = matrices()
    given = {
        "name": "layer.0.weight",
        "rule": "superpose",
        "models": ["a", "b", "c"],
        "deltas": deltas,
        "merged": deltas[0] + deltas[1],
        "seconds": 0.5,
        **changes,
    }
    with diagnostics.recording(path) as recorder:
        recorder.record(**given)  # type: ignore[arg-type]
    (record,) = diagnostics.read(path)
    return record


def test_norms_and_interference_match_a_float64_computation(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl")
    flat = torch.stack([m.double().flatten() for m in matrices()])
    length = flat.norm(dim=1)
    expected = (flat @ flat.T) / torch.outer(length, length)
    torch.testing.assert_close(torch.tensor(record.cosine).double(), expected, rtol=0, atol=1e-6)
    assert record.norms == pytest.approx(length.tolist(), rel=1e-6)
    assert record.norm_sum == pytest.approx(flat.sum(0).norm().item(), rel=1e-6)
    assert record.norm_merged == pytest.approx((flat[0] + flat[1]).norm().item(), rel=1e-6)


def test_the_gram_matrix_is_the_same_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = record_one(tmp_path / "whole.jsonl")
    monkeypatch.setattr("mergekit_stf.host.record_numbers._CHUNK", 37)
    chunked = record_one(tmp_path / "chunked.jsonl")
    assert chunked.cosine[0] == pytest.approx(whole.cosine[0], abs=1e-6)
    assert chunked.norm_sum == pytest.approx(whole.norm_sum, rel=1e-6)


def test_a_zero_task_matrix_has_no_direction(tmp_path: Path) -> None:
    a, b, _ = matrices()
    record = record_one(tmp_path / "d.jsonl", deltas=[a, torch.zeros_like(a), b])
    assert record.norms[1] == 0
    assert record.cosine[1] == [0, 0, 0]


def test_the_solve_is_summarised(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", reports=[solved()])
    assert record.route == "gram"
    assert record.kept == [16, 8]
    assert record.alpha_ratio is not None
    assert record.alpha_ratio == pytest.approx([0.5 + q for q in QUANTILES], abs=1e-5)
    assert record.spectra is not None
    assert [len(spectrum) for spectrum in record.spectra] == [16, 16]
    assert record.spectra[1][0] == pytest.approx(3)
    assert record.spectra[1][-1] == pytest.approx(1)


def test_a_stack_reports_its_worst_expert_and_all_its_features(tmp_path: Path) -> None:
    harder = replace(solved(50.0), iterations=30, residual=1e-5, ridge=1e-3)
    record = record_one(tmp_path / "d.jsonl", reports=[solved(), harder])
    assert record.kept == [32, 16]
    assert (record.condition, record.iterations) == (50.0, 30)
    assert (record.residual, record.ridge) == (1e-5, 1e-3)


def test_an_infinite_condition_survives_the_file(tmp_path: Path) -> None:
    record = record_one(tmp_path / "d.jsonl", reports=[solved(math.inf)])
    assert record.condition == math.inf


def test_lines_are_json_and_leave_out_what_a_rule_has_not(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    record_one(path, rule="sum")
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line["rule"] == "sum"
    assert "condition" not in line


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    deltas = matrices()

    def work(recorder: diagnostics.Recorder, number: int) -> None:
        for index in range(20):
            recorder.record(
                name=f"{number}.{index}",
                rule="sum",
                models=["a", "b", "c"],
                deltas=deltas,
                merged=deltas[0],
                seconds=0.0,
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
    record_one(path)
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    with pytest.raises(STFError, match="line 2 is not a record"):
        diagnostics.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(STFError, match=r"cannot read diagnostics from .*nothing\.jsonl"):
        diagnostics.read(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("kept", [1, 2, 16, 1000])
def test_spectra_are_sampled_from_the_first_to_the_last(kept: int) -> None:
    ranks = spectrum_ranks(kept)
    assert ranks[0] == 1
    assert ranks[-1] == kept
    assert ranks == sorted(ranks)
    assert spectrum_ranks(0) == []
