"""Keys of the store: nothing that decides a bit of M is left out, and nothing else is in them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mergekit_stf
from mergekit_stf.core import STFError, methods
from mergekit_stf.core.methods import Kind
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.merging.job import Task, WeightJob
from mergekit_stf.host.merging.split import parse_split
from mergekit_stf.host.store import entry
from mergekit_stf.host.store.entry import key_of
from mergekit_stf.host.store.store import Store
from tests.host.jobs import STF, job_of, three
from tests.processes import CONTEXT


@pytest.fixture
def fresh_build() -> Iterator[Callable[[], None]]:
    """Forget what is known of this build, for the test and after it."""

    def forget() -> None:
        entry._build.cache_clear()
        entry.sources.cache_clear()

    yield forget
    forget()


def test_every_input_changes_the_key(
    monkeypatch: pytest.MonkeyPatch, fresh_build: Callable[[], None]
) -> None:
    tensors = [torch.arange(12.0).reshape(3, 4), torch.ones(3, 4)]
    options = {"rank": 1.0, "density": (0.2, 1.0)}
    key = key_of(tensors, options)
    assert key_of([t.clone() for t in tensors], dict(reversed(options.items()))) == key
    changed = [t.clone() for t in tensors]
    changed[1].view(torch.uint8)[2, 3] ^= 1
    others = {
        key_of(changed, options),
        key_of(tensors[::-1], options),
        key_of([tensors[0].reshape(4, 3), tensors[1]], options),
        key_of([tensors[0].view(torch.int32), tensors[1]], options),
        key_of(tensors, {**options, "rank": 0.5}),
        key_of(tensors, {**options, "more": None}),
    }
    assert len(others | {key}) == 7
    for name in ("torch", "mergekit_stf"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{name}.__version__", "0")
            fresh_build()
            assert key_of(tensors, options) != key
        fresh_build()
    for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_X"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "AVX2")
            assert key_of(tensors, options) != key
    monkeypatch.setenv("MKL_VERBOSE", "1")
    assert key_of(tensors, options) == key
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    assert key_of(tensors, options) != key


def test_strided_inputs_have_the_key_of_their_values() -> None:
    x = torch.randn(4, 6)
    assert key_of([x.T.contiguous().T], {}) == key_of([x], {})


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        ("core/solve/lanczos.py", True),
        ("core/methods/stf.py", True),
        ("core/trim.py", True),
        ("host/merging/differences.py", True),
        ("host/plugin/groups.py", True),
        ("cli/merge.py", False),
    ],
)
def test_every_module_that_decides_a_matrix_is_in_the_key(
    module: str,
    counts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_build: Callable[[], None],
) -> None:
    package = tmp_path / "mergekit_stf"
    shutil.copytree(Path(mergekit_stf.__file__).parent, package)
    monkeypatch.setattr(mergekit_stf, "__file__", str(package / "__init__.py"))
    fresh_build()
    before = key_of([torch.ones(2)], {})
    with (package / module).open("a", encoding="utf-8") as file:
        file.write("\n")
    fresh_build()
    assert (key_of([torch.ones(2)], {}) != before) is counts


def found(store: Store, job: WeightJob) -> bool:
    """Run a job at a desk with this store, and say whether its matrix was there."""
    before = store.hits
    Desk(store).run(job)
    return store.hits > before


def changed_task(job: WeightJob, **changes: object) -> WeightJob:
    first, *others = job.tasks
    return replace(job, tasks=(replace(first, **changes), *others))


def test_a_job_finds_its_matrix_and_no_other(tmp_path: Path) -> None:
    job, store = job_of(three()), Store(tmp_path)
    assert not found(store, job)
    one_bit = three()[0]
    one_bit.view(torch.uint8)[5, 3] ^= 1
    others = [
        replace(job, options=STF | {"rank": 0.5}),
        replace(job, options=STF | {"ridge": 0.1}),
        replace(job, split=parse_split("rows 2")),
        replace(job, tasks=job.tasks[1:]),
        replace(job, base=torch.ones(24, 16)),
        changed_task(job, weight=0.5),
        changed_task(job, density=0.5),
        changed_task(job, tuned=one_bit),
        replace(changed_task(job, density=0.5), rule="sum"),
    ]
    for other in (job, *others):
        assert found(store, other) is (other is job)
    assert store.written == 1 + len(others)
    assert all(found(store, other) for other in others)


def test_what_does_not_decide_the_matrix_is_not_in_the_key(tmp_path: Path) -> None:
    job, store = job_of(three()), Store(tmp_path)
    first = Desk(store).run(job)
    others = [
        replace(job, scale=0.3),
        replace(job, name="another.weight"),
        replace(job, rule="superpose"),
        replace(job, out_dtype=torch.bfloat16),
        changed_task(job, label="z"),
    ]
    assert all(found(store, other) for other in others)
    torch.set_float32_matmul_precision("medium")
    try:
        again = Desk(store).run(job)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert store.hits == 1 + len(others)
    assert torch.equal(again.tensor, first.tensor)


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_sums_are_stored_where_trimming_takes_time(rule: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    Desk(store).run(job_of(three(), rule=rule))
    assert store.written == 0
    trimmed = job_of(three(), density=0.2, rule=rule)
    assert torch.equal(Desk(store).run(trimmed).tensor, Desk(store).run(trimmed).tensor)
    assert (store.written, store.hits) == (1, 1)


def test_vectors_bases_and_differences_at_hand_are_not_stored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    vectors = [M[0].clone() for M in three()]
    at_hand = tuple(Task(label, delta=M) for label, M in zip("abc", three(), strict=True))
    for job in (
        job_of(vectors, density=0.5, kind=Kind.VECTOR),
        job_of(three(), rule="base"),
        job_of([torch.zeros(24, 16)] * 2),
        replace(job_of(three()), tasks=at_hand),
    ):
        Desk(store).run(job)
    assert list(tmp_path.iterdir()) == []


TOY = """
from mergekit_stf.core.methods import Merged, Method, Option
from mergekit_stf.core.methods.method import describe
from mergekit_stf.core.methods.options import number


class Toy(Method):
    name = "{name}"
    title = "Toy"
    reference = "none"
    options = (Option("factor", 1.0, number, "factor of the sum"),)

    def merge(self, tasks, options):
        M = {sign}options["factor"] * tasks.total()
        return Merged(M, describe(tasks, M))
"""


def toy_merge(module: Path, folder: Path, expected: float, hit: bool, factor: float = 1.0) -> None:
    """Merge by the method that a file defines, and check result and store; in a process."""
    sys.path.insert(0, str(module.parent))
    toy = __import__(module.stem).Toy()
    methods.register(toy)
    store = Store(folder)
    job = job_of(three(), method=toy.name, options={"factor": factor}, name="toy.weight")
    result = Desk(store).run(job).tensor
    torch.testing.assert_close(result, expected * sum(three()))
    assert (store.hits, store.written) == ((1, 0) if hit else (0, 1))


def test_method_its_options_and_its_module_are_in_the_key(tmp_path: Path) -> None:
    def merges(sign: str, expected: float, hit: bool, name: str = "toy", factor: float = 1) -> None:
        module = tmp_path / "toy_of_a_test.py"
        module.write_text(TOY.format(name=name, sign=sign), encoding="utf-8")
        arguments = (module, tmp_path / "store", expected, hit, factor)
        child = CONTEXT.Process(target=toy_merge, args=arguments)
        child.start()
        child.join(120)
        assert child.exitcode == 0

    merges("", 1, False)
    merges("", 1, True)
    merges("-", -1, False)
    merges("", 1, True)
    merges("", 2, False, factor=2)
    merges("", 1, False, name="toy_by_another_name")


def test_a_method_without_a_file_is_refused() -> None:
    typed_at_a_prompt = type("Toy", (), {"__module__": "__main_of_a_prompt__"})
    with pytest.raises(STFError, match=r"source of merge method Toy cannot .* in a file"):
        entry.source_of(typed_at_a_prompt)
