"""The solve of bfloat16 checkpoints with products in bfloat16: how near, when, and when not."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_stf.core import Features, decompose, half, precision, superpose
from mergekit_stf.core.gram import Blocks, responses, spans
from mergekit_stf.core.solve import solve
from mergekit_stf.core.tolerances import HALF_ERROR, RANK
from tests.core.cases import distance, expected


@pytest.fixture
def units(monkeypatch):
    """Let the processor have units for bfloat16, without them the same products are slow, and
    count small matrices as worth it."""
    monkeypatch.setattr(half, "has_bfloat16", lambda device: device.type == "cpu")
    monkeypatch.setattr(half, "SMALLEST", 2)


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(half, "has_bfloat16", lambda device: False)


def draw(seed, m, n, decay=0.5):
    """A random matrix with decaying singular values."""
    generator = torch.Generator().manual_seed(seed)
    scale = (1 + torch.arange(min(m, n)) / 8) ** -decay
    A, B = (torch.randn(s, generator=generator) for s in ((m, min(m, n)), (min(m, n), n)))
    return (A * scale) @ B / min(m, n)


def merged(matrices, **options):
    return superpose(matrices, **{"source_dtype": torch.bfloat16, **options})


def exact(matrices, **options):
    """The same with float32 products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "has_bfloat16", lambda device: False)
        return merged(matrices, **options)


def halved_blocks(features):
    return half.HalfBlocks(half.Halved(features), spans(features))


def residual(matrices, M):
    """How far all features of the matrices are from their responses, in float64."""
    lacking, asked = [], []
    for A in matrices:
        U, s, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        present = s > RANK * s[0]
        lacking.append((s - ((Vh @ M.double().mT) * U.mT).sum(dim=1))[present])
        asked.append(s[present])
    return float(torch.cat(lacking).norm() / torch.cat(asked).norm())


SHAPES = [(256, 256), (384, 160), (160, 384)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_answer_is_the_oracles_to_less_than_a_thousandth(units, shape, tasks):
    matrices = [draw(i, *shape) for i in range(tasks)]
    found = merged(matrices)
    assert distance(found.M, expected(matrices)) <= HALF_ERROR
    if tasks > 1:
        assert not torch.equal(found.M, exact(matrices).M)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(2, 96),
    n=st.integers(2, 96),
    tasks=st.integers(1, 4),
    shared=st.floats(0, 2),
)
def test_it_is_near_float32_products_whatever_the_tasks(units, seed, m, n, tasks, shared):
    common = shared * draw(seed, m, n)
    matrices = [draw(seed + 1 + i, m, n) + common for i in range(tasks)]
    found, plain = merged(matrices), exact(matrices)
    assert torch.linalg.norm(found.M - plain.M) <= 3e-3 * torch.linalg.norm(plain.M)
    assert found.report == plain.report or (
        found.report.precision == "bfloat16" and found.report.residual <= HALF_ERROR
    )


def test_one_task_gives_itself_to_the_bit(units):
    M = draw(0, 80, 60)
    assert torch.equal(merged([M]).M, M)


@pytest.mark.parametrize("decay", [0, 0.5, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_is_measured_on_the_answer(units, shape, decay):
    matrices = [draw(i, *shape, decay) for i in range(4)]
    found = merged(matrices, route="gram_float64")
    whole = residual(matrices, found.M)
    assert 1e-5 <= whole <= HALF_ERROR
    assert found.report.residual == pytest.approx(whole, rel=0.35)


def test_the_sample_sees_an_answer_that_is_wrong():
    matrices = [draw(i, 96, 64) for i in range(3)]
    features = [decompose(M) for M in matrices]
    M = superpose(matrices).M
    moved = [torch.zeros(f.rank) for f in features]
    lacking, asked = half.sampled(features, moved, M)
    assert float((lacking / asked).max()) <= 1e-6
    assert asked.tolist() == pytest.approx([float(A.norm()) for A in matrices])
    lacking, asked = half.sampled(features, moved, 1.01 * M)
    assert (lacking / asked).tolist() == pytest.approx([0.01] * 3, rel=0.1)
    lacking, asked = half.sampled([*features[:2], decompose(draw(9, 96, 64))], moved, M)
    assert (lacking / asked > 0.1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"source_dtype": torch.float32},
        {"source_dtype": torch.float16},
        {"ridge": 0.1},
        {"rank": 0.5},
        {"rank": 20},
    ],
    ids=str,
)
def test_other_recipes_keep_float32_products(units, options):
    matrices = [draw(i, 96, 64) for i in range(3)]
    assert torch.equal(merged(matrices, **options).M, exact(matrices, **options).M)


def test_small_matrices_keep_float32_products(units, monkeypatch):
    monkeypatch.setattr(half, "SMALLEST", 64)
    precisions = [
        merged([draw(i, *shape) for i in range(3)]).report.precision
        for shape in ((64, 63), (63, 64), (64, 64), (65, 64))
    ]
    assert precisions == ["full", "full", "bfloat16", "bfloat16"]


def test_float64_matrices_keep_their_products(units):
    matrices = [draw(i, 96, 64).double() for i in range(3)]
    assert torch.equal(merged(matrices).M, exact(matrices).M)


def test_a_count_of_all_features_is_all_of_them(units):
    matrices = [draw(i, 96, 64) for i in range(3)]
    assert torch.equal(merged(matrices, rank=64).M, merged(matrices).M)


def test_a_processor_without_units_keeps_float32_products(no_units, monkeypatch):
    monkeypatch.setattr(half, "HalfBlocks", None)
    matrices = [draw(i, 96, 64) for i in range(3)]
    assert merged(matrices).report.residual <= 1e-6


CONTRADICTIONS = {
    "equal": lambda A, B: [A, A],
    "a multiple": lambda A, B: [A, 2 * A],
    "opposite": lambda A, B: [A, -A],
    "nearly equal": lambda A, B: [A, A + 0.1 * B],
    "one lineage": lambda A, B: [A, 1.1 * A + 1e-3 * B],
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tasks_that_nearly_agree_keep_float32_products(units, name):
    matrices = CONTRADICTIONS[name](draw(0, 96, 96), draw(1, 96, 96))
    found, plain = merged(matrices), exact(matrices)
    assert torch.equal(found.M, plain.M)
    assert found.report == plain.report


@pytest.mark.parametrize("limit", ["HALF_CHANGE", "HALF_ERROR"])
def test_an_answer_beyond_a_limit_is_not_taken(units, monkeypatch, limit):
    matrices = [draw(i, 96, 64) for i in range(3)]
    assert not torch.equal(merged(matrices).M, exact(matrices).M)
    monkeypatch.setattr(half, limit, 1e-7)
    found, plain = merged(matrices), exact(matrices)
    assert torch.equal(found.M, plain.M)
    assert found.report == plain.report


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({}, True),
        ({"condition": 2.0}, True),
        ({"condition": 4.0}, False),
        ({"cutoff": 0.1}, False),
        ({"converged": False}, False),
    ],
    ids=str,
)
def test_what_the_solve_tells_decides(monkeypatch, told, taken):
    matrices = [draw(i, 96, 64) for i in range(3)]
    features = [decompose(M) for M in matrices]
    measured = 2.5e-3 * torch.ones(3), torch.ones(3)
    monkeypatch.setattr(half, "sampled", lambda features, moved, M: measured)
    monkeypatch.setattr(half, "solve", lambda *args, **more: replace(solve(*args, **more), **told))
    assert (half.superposed(features, sum(matrices)) is not None) is taken


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_sum_is_left_as_it_is(tasks):
    matrices = [draw(i, 200, 200) for i in range(tasks)]
    total = sum(matrices)
    kept = total.clone()
    assert half.superposed([decompose(M) for M in matrices], total) is not None
    assert torch.equal(total, kept)


def test_blocks_that_are_too_large_are_not_formed(units, monkeypatch):
    """Blocks of 36 pairs, eight once more, two copies for each of nine tasks, less their size."""
    matrices = [draw(i, 64, 64) for i in range(9)]
    gram = sys.modules["mergekit_stf.core.gram"]
    monkeypatch.setattr(half, "HALF_ERROR", 1.0)
    needed = (36 + 8 + 2 * 9) * 64 * 64 * 2 - 9 * 64 * 64 * 4
    monkeypatch.setattr(gram, "ROOM", needed)
    assert merged(matrices).report.precision == "bfloat16"
    monkeypatch.setattr(gram, "ROOM", needed - 1)
    assert merged(matrices).report.precision == "full"
    assert torch.equal(merged(matrices).M, exact(matrices).M)


@pytest.mark.parametrize(("scale", "taken"), [(1, True), (0.5, True), (0.01, False), (1e-4, False)])
def test_a_short_task_does_not_drown_in_the_others(units, scale, taken):
    matrices = [draw(0, 256, 256), scale * draw(1, 256, 256), draw(2, 256, 256)]
    found = merged(matrices, route="gram_float64")
    assert (found.report.precision == "bfloat16") is taken
    assert residual(matrices[1:2], found.M) <= HALF_ERROR


def test_many_tasks_that_nearly_agree_keep_float32_products(units):
    matrices = [draw(0, 64, 64) + 0.1 * draw(1 + i, 64, 64) for i in range(20)]
    found, plain = merged(matrices), exact(matrices)
    assert torch.equal(found.M, plain.M)
    assert found.report == plain.report


def test_many_tasks_are_left_to_products_and_sweeps(units):
    matrices = [draw(i, 40, 40) for i in range(40)]
    assert torch.equal(merged(matrices).M, exact(matrices).M)


def nearly_shared(side, rank, hidden, angle, ratio, seed=0):
    """Two tasks of flat spectra whose features at these ranks nearly agree, but for their size."""
    generator = torch.Generator().manual_seed(seed)

    def basis():
        return torch.linalg.qr(torch.randn(side, 2 * rank, generator=generator).double()).Q

    U, V = basis(), basis()
    s = torch.linspace(1, 0.9, rank).double()
    scale = torch.ones(rank).double()
    turned = []
    for B in (U, V):
        first, second = B[:, :rank], B[:, rank:].clone()
        second[:, hidden] = math.cos(angle) * first[:, hidden] + math.sin(angle) * second[:, hidden]
        turned.append((first, second))
    scale[hidden] = ratio
    (U1, U2), (V1, V2) = turned
    return [((U1 * s) @ V1.mT).float(), ((U2 * s * scale) @ V2.mT).float()]


@pytest.mark.parametrize("rank", [17, 20, 23, 24, 40, 120])
@pytest.mark.parametrize("angle", [0.05, 0.1, 0.2])
def test_nearly_shared_features_at_any_rank_do_not_go_wrong(units, rank, angle):
    for hidden in ([rank - 1], list(range(max(0, rank - 8), rank)), [rank // 2]):
        matrices = nearly_shared(256, rank, hidden, angle, 1.1)
        found, plain = merged(matrices), exact(matrices)
        assert torch.linalg.norm(found.M - plain.M) <= 5e-3 * torch.linalg.norm(plain.M)


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 23, 24, 25, 39, 40, 64])
def test_every_feature_has_a_share_in_the_sample(rank):
    """One that the solve moved is measured, and evenly spread lacks are told as they are."""
    Q, R = (torch.linalg.qr(draw(i, 96, 96)).Q for i in (0, 1))
    f = Features(Q[:, :rank], torch.ones(rank), R[:rank], "made")
    for k in range(rank):
        moved = torch.zeros(rank)
        moved[k] = 1
        M = Q[:, :rank] @ R[:rank] - torch.outer(Q[:, k], R[k])
        lacking, _ = half.sampled([f], [moved], M)
        assert float(lacking) >= 0.9
    lacking, asked = half.sampled([f], [torch.zeros(rank)], 0.5 * Q[:, :rank] @ R[:rank])
    assert float(lacking / asked) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_equal_tasks_of_any_scale_are_told(units, scale):
    A = scale * draw(0, 96, 64)
    features = [decompose(M) for M in (A, A)]
    assert half.superposed(features, A + A) is None


def test_sides_whose_copies_take_too_much_memory_keep_float32_products(units, monkeypatch):
    matrices = [draw(i, 96, 64) for i in range(3)]
    monkeypatch.setattr(half, "LARGEST", 64)
    assert merged(matrices).report.precision == "bfloat16"
    monkeypatch.setattr(half, "LARGEST", 63)
    assert merged(matrices).report.precision == "full"


def test_zero_matrices_low_ranks_and_empty_columns_are_summed_too(units):
    low = draw(1, 300, 4) @ draw(2, 4, 280)
    gaps = draw(3, 300, 280)
    gaps[:, ::3] = 0
    low *= gaps.norm() / low.norm()
    matrices = [low, torch.zeros(300, 280), gaps]
    found = merged(matrices)
    assert distance(found.M, expected(matrices)) <= HALF_ERROR
    assert not torch.equal(found.M, exact(matrices).M)


def test_inputs_are_left_as_they_are(units):
    matrices = [draw(i, 96, 64) for i in range(3)]
    copies = [M.clone() for M in matrices]
    merged(iter(matrices))
    assert all(torch.equal(M, copy) for M, copy in zip(matrices, copies, strict=True))


def test_the_same_bytes_again(units):
    matrices = [draw(i, 256, 160) for i in range(3)]
    assert torch.equal(merged(matrices).M, merged(matrices).M)


def test_blocks_in_bfloat16_are_those_of_float32_rounded():
    features = [decompose(draw(i, 200, 150), rank=r) for i, r in enumerate((1.0, 0.5, 7))]
    alpha = torch.randn(232, generator=torch.Generator().manual_seed(9)).double()
    plain, narrow = Blocks(features).apply(alpha), halved_blocks(features).apply(alpha)
    difference = (narrow - plain).norm() / (plain - alpha).norm()
    assert 1e-4 <= difference <= 2**-7


def test_the_change_is_assembled_from_all_features():
    features = [decompose(draw(i, 200, 150)) for i in range(3)]
    alpha = solve(features).alpha
    found = half.Halved(features).combine(torch.cat(alpha)).float()
    whole = sum((f.U * a) @ f.Vh for f, a in zip(features, alpha, strict=True))
    assert found.shape == (200, 150)
    assert torch.linalg.norm(found - whole) <= 2**-7 * torch.linalg.norm(whole)


def test_responses_of_a_sample_are_those_of_the_whole():
    f = decompose(draw(0, 96, 64))
    M = draw(1, 96, 64)
    part = Features(f.U[:, ::16], f.s[::16], f.Vh[::16], f.route)
    torch.testing.assert_close(responses(part, M), responses(f, M)[::16])


@pytest.mark.parametrize(
    ("known", "answer"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_the_processor_is_asked(monkeypatch, known, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert precision.has_bfloat16(torch.device("cpu")) is answer
    assert precision.has_bfloat16(torch.device("meta")) is False
    assert precision.instructions().endswith(" and bfloat16") is answer


def test_an_older_torch_counts_as_without_units(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.has_bfloat16(torch.device("cpu")) is False
