"""Checkpoints written piece by piece, against the library's own writer and readers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.checkpoints import shards as adapter_shards
from mergekit_stf.host.checkpoints.headers import Header
from mergekit_stf.host.checkpoints.shards import SyncedFile, write_shards

TYPES = [t for t in adapter_shards.CODES if not t.is_floating_point and t != torch.complex64]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def header(tensor: Tensor) -> Header:
    return Header(tuple(tensor.shape), tensor.dtype)


def write(tensors: dict[str, Tensor], out: Path, limit: int = 10**9) -> None:
    def pieces(name: str) -> Iterator[Tensor]:
        yield from tensors[name].split(2) if tensors[name].ndim else [tensors[name]]

    write_shards({name: header(t) for name, t in tensors.items()}, pieces, out, limit)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert header(found[name]) == header(tensor)
        assert torch.equal(found[name], tensor)


def test_one_file_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    tensors = {"a.ü": torch.randn(5, 3), "b": torch.randn(7), "c": torch.empty(0, 4)}
    write(tensors, tmp_path)
    save_file(tensors, tmp_path / "other", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "other").read_bytes()


def test_every_type_is_read_again(tmp_path: Path) -> None:
    tensors = {str(t): torch.arange(5).to(t) for t in TYPES}
    tensors |= {str(t): torch.randn(3, 5).to(t).T for t in FLOATS} | {"scalar": torch.tensor(2.0)}
    write(tensors, tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4, 4) for name in "abc"} | {"big": torch.randn(40, 4)}
    write(tensors, tmp_path, limit=2 * 64)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert set(load_file(tmp_path / names[0])) == {"a", "b"}
    loader = LazyTensorLoader.from_disk(str(tmp_path))
    assert_same({name: loader.get_tensor(name) for name in loader.index.tensor_paths}, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_type_without_a_code_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(STFError, match=r"odd: torch\.complex128 cannot be stored"):
        write({"odd": torch.zeros(2, dtype=torch.complex128)}, tmp_path)


def test_disk_takes_the_bytes_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(adapter_shards, "SYNCED", 10)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    with SyncedFile(tmp_path / "file") as file:
        file.write(memoryview(b"x" * 100_000))
        file.write(memoryview(b"y"))
    assert len(synced) >= 2
    assert synced[-1] == 100_001


def test_failure_of_the_disk_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_shards, "SYNCED", 10)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), SyncedFile(tmp_path / "file") as file:
        file.write(memoryview(b"x" * 20))
