"""``mergekit-stf verify`` finds every change, and nothing where nothing has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mergekit.options import MergeOptions

from mergekit_stf.cli.main import main
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.provenance.conditions import NOT_RECORDED, Options
from mergekit_stf.host.provenance.lock import read_lock, text_digest
from mergekit_stf.host.run.network import stay_offline
from tests.host.models import save_family


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    models = save_family("llama", root / "models", tasks=2)
    tuned = "".join(f"  - model: models/{model.name}\n" for model in models.tuned)
    text = f"merge_method: stf\nbase_model: models/{models.base.name}\nmodels:\n{tuned}"
    (root / "recipe.yml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = CliRunner().invoke(main, ["merge", "recipe.yml", "out"])
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def verify(*options: str) -> Result:
    return CliRunner().invoke(main, ["verify", "out", *options])


def edit_lock(root: Path, change: Callable[[dict[str, Any]], None], seal: bool = True) -> None:
    """Change a lock, and the digest of itself with it, as somebody would who knows of it."""
    path = root / "out" / "stf.lock.json"
    lock = json.loads(path.read_text())
    change(lock)
    path.write_text(json.dumps(lock))
    try:
        lock["sha256"] = read_lock(root / "out").digest()
    except STFError:
        return
    if seal:
        path.write_text(json.dumps(lock))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_nothing_has_changed(root: Path) -> None:
    result = verify()
    assert result.exit_code == 0, result.output
    assert result.output == (
        "out: 9 input and 5 output files verified\n"
        "out: 21 tensors fill 21 parameters of LlamaForCausalLM, and all values are finite\n"
    )


@pytest.mark.slow
def test_a_rebuild_in_a_fresh_process_with_another_hash_seed(root: Path) -> None:
    command = "from mergekit_stf.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "verify", "out", "--rebuild"],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "files verified, and merged again to the same bytes\n" in done.stdout


def test_a_rebuild_is_of_the_folder_that_a_link_names(root: Path) -> None:
    (root / "current").symlink_to("out")
    result = CliRunner().invoke(main, ["verify", "current", "--rebuild"])
    assert result.exit_code == 0, result.output


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def edit_raw(root: Path, part: str, key: str, value: str = "other") -> None:
    edit_lock(root, lambda lock: lock[part].update({key: value}), seal=False)


CHANGED = "stf.lock.json: it was changed after the merge"

CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda root: flip(root / "models/tuned1/model.safetensors", -1),
        "input models/tuned1: model.safetensors: other bytes",
    ),
    (
        lambda root: flip(root / "models/base/config.json", 5),
        "input models/base: config.json: other bytes",
    ),
    (
        lambda root: (root / "models/base/config.json").unlink(),
        "input models/base: config.json: missing",
    ),
    (
        lambda root: shutil.rmtree(root / "models/tuned2"),
        "input models/tuned2: not on this machine ([Errno 2]",
    ),
    (
        lambda root: flip(root / "out/model.safetensors", -1),
        "output model.safetensors: other bytes",
    ),
    (lambda root: (root / "out/README.md").write_text("x"), "output README.md: 1 bytes, was "),
    (lambda root: (root / "out/config.json").unlink(), "output config.json: missing"),
    (lambda root: (root / "out/evil.py").touch(), "output evil.py: not in the lock"),
    (
        lambda root: (root / "out/1_Pooling").symlink_to("/etc"),
        "output 1_Pooling: not in the lock",
    ),
    (lambda root: (root / "out/loop").symlink_to("loop"), "output loop: not in the lock"),
    (lambda root: os.mkfifo(root / "out/pipe"), "output pipe: not in the lock"),
    (lambda root: put(root / "out/deep/er/x"), "output deep/er/x: not in the lock"),
    (lambda root: put(root / "out/stf-report/x.py"), "output stf-report/x.py: not in the lock"),
    (
        lambda root: put(root / "out/stf-report/alpha.png/x"),
        "output stf-report/alpha.png/x: not in the lock",
    ),
    (
        lambda root: (root / "out/stf-report.html").symlink_to("/etc/passwd"),
        "output stf-report.html: not in the lock",
    ),
    (lambda root: put(Path(os.fsdecode(b"out/\xff"))), "output \\udcff: not in the lock"),
    (lambda root: edit_raw(root, "machine", "vectors"), CHANGED),
    (lambda root: edit_raw(root, "options", "lora_merge_dtype", "float32"), CHANGED),
    (
        lambda root: edit_lock(root, lambda lock: lock.update(threads=9), seal=False),
        CHANGED,
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock["versions"].pop("numpy")),
        "version of numpy: merged with none, here is",
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock["versions"].update(torch="1.0")),
        "version of torch: merged with 1.0, here is",
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock["versions"].update(gone="2")),
        "version of gone: merged with 2, here is not installed",
    ),
    (
        lambda root: edit_lock(root, lambda lock: lock.update(recipe="merge_method: ties")),
        "stf.lock.json: the recipe in it was changed",
    ),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_every_change_is_found(root: Path, change: Callable[[Path], object], expected: str) -> None:
    change(root)
    result = verify()
    assert result.exit_code == 3, result.output
    lines = result.output.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(expected)
    assert lines[1] == "out: 1 differences from stf.lock.json"


def test_a_rebuild_finds_what_a_forged_lock_hides(root: Path) -> None:
    def forge(lock: dict[str, Any]) -> None:
        lock["recipe"] += "parameters: {lambda: 0.5}\n"
        lock["recipe_sha256"] = text_digest(lock["recipe"])

    edit_lock(root, forge)
    assert verify().exit_code == 0
    result = verify("--rebuild")
    assert result.exit_code == 3
    assert "rebuilt model.safetensors: other bytes" in result.output


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return result.output


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "", ".", "..", "a\x00b", "c:\\x", "a\nb"]
)
@pytest.mark.parametrize("kind", ["outputs", "models"])
def test_names_in_a_lock_stay_inside_their_roots(root: Path, name: str, kind: str) -> None:
    def forge(lock: dict[str, Any]) -> None:
        files = lock["outputs"] if kind == "outputs" else lock["models"][0]["files"]
        files[0]["name"] = name

    edit_lock(root, forge)
    assert "is no file name inside" in refused(verify())


def test_a_link_out_of_the_output_is_not_followed(root: Path) -> None:
    path = root / "out" / "README.md"
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    assert "leads out of out through a link" in refused(verify())


def test_a_lock_starts_no_download(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def network(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    edit_lock(root, lambda lock: lock["models"][0].update(reference="a/b", commit="c" * 40))
    result = verify()
    assert result.exit_code == 3
    assert "input a/b: not on this machine" in result.output


def test_a_hub_model_is_found_by_its_commit(root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--base" / "snapshots" / ("c" * 40)
    shutil.copytree(root / "models" / "base", snapshot)
    edit_lock(root, lambda lock: lock["models"][0].update(reference="some/base", commit="c" * 40))
    assert verify("--transformers-cache", str(tmp_path / "hub")).exit_code == 0
    flip(snapshot / "config.json", 3)
    result = verify("--transformers-cache", str(tmp_path / "hub"))
    assert "input some/base: config.json: other bytes" in result.output


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "\xff", "[" * 9999]
)
def test_a_damaged_lock(root: Path, text: str) -> None:
    (root / "out" / "stf.lock.json").write_text(text, encoding="latin-1")
    assert "stf.lock.json is damaged: " in refused(verify())


def test_no_lock(root: Path) -> None:
    (root / "out" / "stf.lock.json").unlink()
    assert "stf.lock.json: cannot be read: No such file" in refused(verify())


def test_a_lock_turns_on_no_remote_code(root: Path) -> None:
    edit_lock(root, lambda lock: lock["options"].update(trust_remote_code=True))
    assert "was merged with --trust-remote-code; say so here" in refused(verify("--rebuild"))


def test_a_rebuild_on_another_processor_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "the processor has other vector instructions"
    verify("--rebuild")
    assert said not in caplog.text
    edit_lock(root, lambda lock: lock["machine"].update(vectors="AVX1024"))
    verify("--rebuild")
    assert said in caplog.text


def test_a_rebuild_needs_the_same_device(root: Path) -> None:
    edit_lock(root, lambda lock: lock.update(device="NVIDIA H200"))
    assert "merged on NVIDIA H200, here is cpu; its bytes" in refused(verify("--rebuild"))


DAMAGES: list[tuple[str, dict[str, Any]]] = [
    ("options.out_shard_size", {"out_shard_size": "many"}),
    ("options.out_shard_size", {"out_shard_size": 0}),
    ("options.cuda", {"cuda": "yes"}),
    ("options.device", {"device": "toaster"}),
    ("options.lora_merge_dtype", {"lora_merge_dtype": "int3"}),
    ("options.random_seed", {"random_seed": -1}),
    ("options.random_seed", {"random_seed": 2**32}),
    ("options.lora_merge_cache", {"lora_merge_cache": "/tmp/victim"}),
    ("options.transformers_cache", {"transformers_cache": "/tmp/victim"}),
    ("options.num_threads", {"num_threads": 10**6}),
]


@pytest.mark.parametrize(("where", "change"), DAMAGES)
def test_options_of_a_lock_are_known_and_in_range(
    root: Path, where: str, change: dict[str, Any]
) -> None:
    edit_lock(root, lambda lock: lock["options"].update(change))
    for options in ([], ["--rebuild"]):
        assert f"stf.lock.json is damaged: {where}: " in refused(verify(*options))


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("threads", {"threads": 0}),
        ("threads", {"threads": -1}),
        ("threads", {"threads": 1.5}),
        ("machine.cards", {"machine": {"cards": "8"}}),
        ("options.cuda", {"options": {}}),
        ("more", {"more": 1}),
    ],
)
def test_conditions_of_a_lock_are_known_and_in_range(
    root: Path, where: str, change: dict[str, Any]
) -> None:
    def forge(lock: dict[str, Any]) -> None:
        for name, value in change.items():
            kept = lock[name] if name == "machine" else {}
            lock[name] = {**kept, **value} if isinstance(value, dict) else value

    edit_lock(root, forge)
    assert "stf.lock.json is damaged: " in (said := refused(verify("--rebuild")))
    assert f"{where}: " in said or where == "options.cuda"


def test_a_rebuild_starts_no_million_threads(root: Path) -> None:
    edit_lock(root, lambda lock: lock.update(threads=10**6))
    assert "1000000 threads; at most 1024 are started" in refused(verify("--rebuild"))


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "xpu", "mps"])
def test_a_rebuild_on_a_device_that_is_not_here(root: Path, device: str) -> None:
    edit_lock(root, lambda lock: lock["options"].update(device=device))
    edit_lock(root, lambda lock: lock.update(device="NVIDIA H200"))
    assert "merged on NVIDIA H200, " in refused(verify("--rebuild"))


@pytest.mark.parametrize("rank", ["0", "-1", "x", "9" * 5000, "\u0663"])
def test_a_rank_of_a_lock_is_a_rank(root: Path, rank: str) -> None:
    edit_lock(root, lambda lock: lock.update(command=["lora", "--adapter", "--max-rank", rank]))
    assert "its command is damaged" in refused(verify("--rebuild"))


def unlisted(lock: dict[str, Any]) -> None:
    lock["models"] = []


def elsewhere(lock: dict[str, Any]) -> None:
    lock["recipe"] = lock["recipe"].replace("models/base", "some/base")
    lock["recipe_sha256"] = text_digest(lock["recipe"])


def without_files(lock: dict[str, Any]) -> None:
    lock["models"][0]["files"] = []


@pytest.mark.parametrize("forge", [unlisted, elsewhere, without_files])
def test_a_rebuild_reads_what_the_lock_lists_and_asks_no_hub(
    root: Path, forge: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", network)
    monkeypatch.setattr("socket.getaddrinfo", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    edit_lock(root, forge)
    said = refused(verify("--rebuild"))
    assert "than its list of models says" in said or "some/base: no such folder" in said
    assert "asked the network" not in said


def test_a_rebuild_takes_hub_models_from_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged from a cache of the hub and rebuilt from it, without the network."""
    cache, commit = tmp_path / "hub", "c" * 40
    repository = cache / "models--some--base"
    shutil.copytree(root / "models" / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    recipe = root / "recipe.yml"
    recipe.write_text(recipe.read_text().replace("models/base", "some/base"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    shutil.rmtree(root / "out")
    with stay_offline():
        done = CliRunner().invoke(main, ["merge", "recipe.yml", "out"])
    assert done.exit_code == 0, done.output
    done = verify("--rebuild")
    assert done.exit_code == 0, done.output
    assert read_lock(root / "out").models[2].commit == commit
    shutil.copytree(root / "models" / "base", repository / "snapshots" / ("d" * 40))
    (repository / "refs" / "main").write_text("d" * 40)
    said = refused(verify("--rebuild"))
    assert "reads some/base here as other files, or as another commit" in said


def test_a_rebuild_with_other_kernels_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_lock(root / "out").machine.kernels == "default"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    verify("--rebuild")
    assert "merged with other kernels (default) than here (ONEDNN_MAX_CPU_ISA=AVX2)" in caplog.text


@pytest.mark.slow
def test_the_figures_of_a_report_are_known(root: Path) -> None:
    assert CliRunner().invoke(main, ["report", "out", "--quiet"]).exit_code == 0
    assert len(list((root / "out" / "stf-report").iterdir())) >= 5
    assert verify().exit_code == 0


def test_every_option_of_the_host_is_recorded_or_left_out_on_purpose() -> None:
    known = set(MergeOptions.model_fields)
    assert set(Options.model_fields) | NOT_RECORDED == known
    assert not set(Options.model_fields) & NOT_RECORDED
