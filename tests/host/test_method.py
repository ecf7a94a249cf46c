"""The method inside the host: parameters, order, types, errors; values against the oracle."""

import logging
from itertools import permutations

import numpy as np
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_stf.core import STFError
from mergekit_stf.host.merging.desk import Desk
from mergekit_stf.host.plugin.method import host_method
from tests import oracle
from tests.host.models import save_family
from tests.rules import rule_for

LAYERS = ("model.layers.0.", "model.layers.1.")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("llama"))


def tensors(folder):
    return {k: v.double().numpy() for k, v in load_file(folder / "model.safetensors").items()}


def recipe(checkpoints, **extra):
    models = [{"model": str(folder)} for folder in checkpoints.tuned]
    return {
        "merge_method": "stf",
        "base_model": str(checkpoints.base),
        "models": models,
        **extra,
    }


def merged(settings, out):
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    with host_method("stf").at(Desk()):
        run_merge(MergeConfiguration.model_validate(settings), str(out), options)
    return load_file(out / "model.safetensors")


def check(result, checkpoints, value):
    """Compare every weight with the oracle, whose arguments ``value(name)`` gives."""
    base = tensors(checkpoints.base)
    tuned = [tensors(folder) for folder in checkpoints.tuned]
    assert set(result) == set(base)
    for name, P0 in base.items():
        vocabulary = 0 if "embed_tokens" in name or "lm_head" in name else None
        given = {"weights": [1.0] * len(tuned), "densities": [1.0] * len(tuned), "lam": 0.8}
        given |= {"rule": rule_for(name, P0.shape, vocabulary)} | value(name)
        if given["rule"] == "base":
            np.testing.assert_array_equal(result[name].double().numpy(), P0)
            continue
        expected = oracle.merge_weight(P0, [t[name] for t in tuned], **given)
        error = np.linalg.norm(result[name].double().numpy() - expected)
        assert error <= 1e-5 * np.linalg.norm(expected - P0), name


def test_defaults_and_a_recipe_written_for_ties(llama, tmp_path, caplog):
    check(merged(recipe(llama), tmp_path / "a"), llama, lambda name: {})
    settings = recipe(llama, parameters={"normalize": True, "int8_mask": True, "lambda": 1.0})
    for model, weight in zip(settings["models"], (0.5, 1.0, 2.0), strict=True):
        model["parameters"] = {"weight": weight, "density": 0.5}
    expected = {"weights": [0.5, 1.0, 2.0], "densities": [0.5] * 3, "lam": 1.0}
    with caplog.at_level(logging.WARNING):
        check(merged(settings, tmp_path / "b"), llama, lambda name: expected)
    said = [record.message for record in caplog.records if "no use for" in record.message]
    assert len(said) == 2
    assert "normalize: True" in said[0]


def test_filters_for_every_parameter(llama, tmp_path):
    def filtered(inside, outside):
        return [{"filter": "mlp", "value": inside}, {"value": outside}]

    settings = recipe(
        llama,
        parameters={
            "lambda": filtered(0.5, 1.1),
            "rank": filtered(4, 0.5),
            "rule": [{"filter": "v_proj", "value": "base"}, {"filter": "o_proj", "value": "sum"}],
            "density": filtered(0.3, 0.9),
        },
    )
    settings["models"][1]["parameters"] = {"weight": filtered(2.0, 0.5)}

    def value(name):
        mlp = "mlp" in name
        given = {
            "lam": 0.5 if mlp else 1.1,
            "rank": 4 if mlp else 8,
            "densities": [0.3 if mlp else 0.9] * 3,
            "weights": [1.0, 2.0 if mlp else 0.5, 1.0],
        }
        if "v_proj" in name:
            given["rule"] = "base"
        if "o_proj" in name:
            given["rule"] = "sum"
        return given

    check(merged(settings, tmp_path / "out"), llama, value)


def test_gradients_over_the_layers(llama, tmp_path):
    settings = recipe(llama, parameters={"lambda": [0.2, 1.0], "density": [0.25, 0.75]})

    def value(name):
        last = not name.startswith(LAYERS[0]) and name.startswith(LAYERS[1])
        return {"lam": 1.0 if last else 0.2, "densities": [0.75 if last else 0.25] * 3}

    check(merged(settings, tmp_path / "out"), llama, value)


def test_slices_with_their_own_parameters(llama, tmp_path):
    def layer(index, **parameters):
        folders = [llama.base, *llama.tuned]
        sources = [{"model": str(folder), "layer_range": [index, index + 1]} for folder in folders]
        return {"sources": sources, "parameters": parameters}

    settings = recipe(llama, slices=[layer(0, **{"lambda": 0.3}), layer(1, density=0.5)])
    del settings["models"]

    def value(name):
        first = not name.startswith(LAYERS[1]) and name not in (
            "model.norm.weight",
            "lm_head.weight",
        )
        return {"lam": 0.3} if first else {"densities": [0.5] * 3}

    check(merged(settings, tmp_path / "out"), llama, value)


def test_modules_with_their_own_parameters(llama, tmp_path):
    settings = recipe(llama)
    module = {"models": settings.pop("models"), "parameters": {"lambda": 0.6}}
    settings["modules"] = {"default": module}
    check(merged(settings, tmp_path / "out"), llama, lambda name: {"lam": 0.6})


def test_a_numeric_ridge_reaches_the_solve():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    stacked = [torch.zeros(3, 3), A, A]
    M = merge_tensors(
        stacked, "stf", base_index=0, name="q_proj.weight", parameters={"ridge": 0.5, "lambda": 1.0}
    )
    torch.testing.assert_close(M, A * 2 / 2.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_float32_or_better_and_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 40, generator=generator).to(dtype)
    tuned = [(base + 0.05 * torch.randn(48, 40, generator=generator)).to(dtype) for _ in range(3)]
    result = merge_tensors([base, *tuned], "stf", base_index=0, name="q_proj.weight")
    assert result.dtype == dtype
    expected = oracle.merge_weight(
        base.double().numpy(),
        [P.double().numpy() for P in tuned],
        "superpose",
        [1.0] * 3,
        [1.0] * 3,
        0.8,
    )
    error = np.abs(result.double().numpy() - expected)
    unit = torch.finfo(dtype).eps
    engine = 0 if dtype == torch.float64 else 1e-5 * np.abs(expected - base.double().numpy()).max()
    assert (error <= 0.51 * unit * np.abs(expected) + 10 * engine + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_few_hundred_features_are_merged_to_the_rounding_of_the_checkpoints(dtype):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(256, 260, generator=generator).to(dtype)
    noise = [0.002 * torch.randn(256, 260, generator=generator) for _ in range(3)]
    tuned = [(base + part).to(dtype) for part in noise]
    result = merge_tensors([base, *tuned], "stf", base_index=0, name="q_proj.weight")
    found = result.double() - base.double()
    merged = oracle.superpose([(P.double() - base.double()).numpy() for P in tuned])
    rounding = torch.finfo(dtype).eps * result.double().abs().numpy()
    assert (np.abs(found.numpy() - 0.8 * merged) <= 0.5 * rounding + 5e-3 * 0.002).all()


def test_rounds_to_the_output_type_without_a_detour():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(32, 32, generator=generator).bfloat16()
    tuned = [(base + 0.05 * torch.randn(32, 32, generator=generator)).bfloat16() for _ in range(2)]
    states = {"base": {"q_proj.weight": base}, "a": {"q_proj.weight": tuned[0]}}
    states["b"] = {"q_proj.weight": tuned[1]}
    (fine,) = merge_state_dicts(states, "stf", base="base", out_dtype=torch.float32).values()
    assert fine.dtype == torch.float32
    assert not torch.equal(fine, fine.bfloat16().float())
    (coarse,) = merge_state_dicts(states, "stf", base="base").values()
    assert torch.equal(coarse, fine.bfloat16())


def test_mixed_types_are_promoted():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(20, 20, generator=generator)
    tuned = [base + 0.1 * torch.randn(20, 20, generator=generator) for _ in range(2)]
    mixed = [base, tuned[0].half(), tuned[1].bfloat16()]
    exact = [base, tuned[0].half().float(), tuned[1].bfloat16().float()]
    result = merge_tensors(mixed, "stf", base_index=0, name="q_proj.weight")
    assert torch.equal(result, merge_tensors(exact, "stf", base_index=0, name="q_proj.weight"))


def test_the_order_of_models_does_not_change_a_byte():
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(40, 30, generator=generator)
    tuned = [base + 0.1 * torch.randn(40, 30, generator=generator) for _ in range(3)]
    weights = [1.0, 0.7, 1.3]
    for name in ("q_proj.weight", "embed_tokens.weight", "norm.weight"):
        results = []
        for order in permutations(range(3)):
            inputs = [base, *(tuned[i] for i in order)]
            parameters = {"weight": [weights[i] for i in order], "density": 0.5}
            results.append(
                merge_tensors(inputs, "stf", base_index=0, name=name, parameters=parameters)
            )
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_stack_of_experts_is_merged_expert_by_expert():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4, 24, 16, generator=generator)
    tuned = [base + 0.1 * torch.randn(4, 24, 16, generator=generator) for _ in range(2)]
    parameters = {"density": 0.4}
    name = "mlp.experts.gate_up_proj"
    whole = merge_tensors([base, *tuned], "stf", base_index=0, name=name, parameters=parameters)
    for index in range(4):
        single = [base[index], *(P[index] for P in tuned)]
        expected = merge_tensors(
            single, "stf", base_index=0, name="w1.weight", parameters=parameters
        )
        torch.testing.assert_close(whole[index], expected, rtol=1e-5, atol=1e-6)


def test_inputs_are_never_changed():
    base, a, b = (torch.randn(12, 10) for _ in range(3))
    before = [x.clone() for x in (base, a, b)]
    for name in ("q_proj.weight", "embed_tokens.weight", "norm.weight"):
        merge_tensors([base, a, b], "stf", base_index=0, name=name, parameters={"density": 0.3})
    assert all(torch.equal(x, y) for x, y in zip((base, a, b), before, strict=True))


def test_a_single_model_comes_back_scaled():
    base, tuned = torch.randn(12, 10), torch.randn(12, 10)
    result = merge_tensors([base, tuned], "stf", base_index=0, name="q_proj.weight")
    torch.testing.assert_close(result, base + 0.8 * (tuned - base))


def test_models_that_equal_the_base_give_the_base_bit_for_bit():
    base = torch.randn(12, 10).bfloat16()
    result = merge_tensors([base, base.clone(), base.clone()], "stf", base_index=0, name="q.weight")
    assert torch.equal(result, base)
    other = base + 1
    alone = merge_tensors([base, base.clone(), other], "stf", base_index=0, name="q.weight")
    torch.testing.assert_close(
        alone, (base.float() + 0.8 * (other.float() - base.float())).bfloat16()
    )


def refusal(match, inputs, name="q_proj.weight", base_index=0, **parameters):
    with pytest.raises((STFError, ValueError), match=match) as caught:
        merge_tensors(
            inputs,
            "stf",
            base_index=base_index,
            name=name,
            ids=["base", "a", "b"][: len(inputs)],
            parameters=parameters,
        )
    assert "\n" not in str(caught.value)


def test_what_is_refused_is_named():
    base, a, b = (torch.randn(6, 4) for _ in range(3))
    refusal("stf needs `base_model`", [base, a], base_index=None)
    refusal("at least one model besides the base", [base])
    refusal(r"size mismatch for q_proj.weight.*\(6, 4\)", [base, a[:5], b])
    for value in (float("nan"), float("inf")):
        broken = a.clone()
        broken[2, 1] = value
        refusal("q_proj.weight: a has 1 entries that are NaN or infinite", [base, broken, b])
        refusal("q_proj.weight: base_model has 1 entries", [broken, a, b])
        refusal("embed.weight: b has 1 entries", [base, a, broken], name="embed.weight")
    quantised = [x.to(torch.float8_e4m3fn) for x in (base, a, b)]
    refusal("q_proj.weight: float8_e4m3fn .* dequantise", quantised)
    refusal(r"`rule: sum` for this weight", [x[0] for x in (base, a, b)], rule="superpose")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("density", 0),
        ("density", -0.1),
        ("density", 1.2),
        ("density", "most"),
        ("rank", 0),
        ("rank", -3),
        ("lambda", float("nan")),
        ("lambda", float("inf")),
        ("lambda", True),
        ("weight", float("nan")),
        ("ridge", -1),
        ("ridge", "some"),
        ("rule", "superpos"),
    ],
)
def test_parameters_out_of_range_are_named(name, value):
    inputs = [torch.randn(3, 3) for _ in range(3)]
    refusal(rf"parameter `{name}`: must be .*, got ", inputs, **{name: value})


def test_integer_buffers_that_differ_are_refused_and_equal_ones_are_kept():
    states = [{"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 2])}]
    assert torch.equal(merge_state_dicts(states, "stf", base=0)["n"], torch.tensor([1, 2]))
    states[1]["n"] = torch.tensor([1, 3])
    with pytest.raises(ValueError, match="buffer 'n' differs"):
        merge_state_dicts(states, "stf", base=0)


def test_near_duplicates_are_named_once_with_a_sum_at_the_end(caplog):
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(40, 40)
    A = torch.randn(40, 40, generator=generator)
    B = 1.1 * A + 1e-4 * torch.randn(40, 40, generator=generator)
    C = torch.randn(40, 40, generator=generator)
    desk = Desk()
    with host_method("stf").at(desk), caplog.at_level(logging.WARNING, logger="mergekit_stf"):
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            merge_tensors([base, A, B, C], "stf", base_index=0, name=name, ids=["o", "a", "b", "c"])
        assert len(caplog.records) == 1
        assert "q_proj.weight" in caplog.text
        assert "a and b" in caplog.text
        desk.notices.close()
    line = "3 weights were ill-posed and damped: a and b (3 weights)"
    assert [record.message for record in caplog.records[1:]] == [line]
    assert Desk().notices.summary() is None


def test_an_error_of_the_hosts_own_command_points_to_plan() -> None:
    states = {
        "base": {"a.weight": torch.ones(2, 2)},
        "x": {"a.weight": torch.full((2, 2), torch.inf)},
    }
    with pytest.raises(STFError) as raised:
        merge_state_dicts(states, "stf", base="base")
    assert "`mergekit-stf plan CONFIG`" in raised.value.__notes__[0]
    with pytest.raises(STFError) as raised:
        merge_state_dicts(states, "stf")
    assert "`mergekit-stf plan CONFIG`" in raised.value.__notes__[0]
    with pytest.raises(STFError) as raised, host_method("stf").at(Desk()):
        merge_state_dicts(states, "stf", base="base")
    assert not hasattr(raised.value, "__notes__")
