"""In every route an adapter changes the weights that it means, all of them, or is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_stf.core.errors import STFError
from mergekit_stf.host.adapters.names import KnownWeights, resolve
from mergekit_stf.host.planning.plan import make_plan
from mergekit_stf.host.recipe.recipe import check_recipe
from mergekit_stf.host.run.merge import merge_recipe
from tests.host import merging
from tests.host import peft_adapters as made
from tests.host.models import TEXT, gpt2, llama, save_model, t5
from tests.host.test_adapters import merged

QUIET = MergeOptions(quiet=True, copy_tokenizer=False, lora_merge_dtype="float32")
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
PROJECTIONS = r".*layers.*self_attn\.(q_proj|v_proj)"


def qwen() -> tuple[Any, Any]:
    text = TEXT | {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    vision |= {"hidden_size": 8, "intermediate_size": 12}
    tokens = {
        f"{kind}_token_id": n
        for n, kind in enumerate(("image", "video", "vision_start", "vision_end"))
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return (
        transformers.Qwen2_5_VLForConditionalGeneration(config),
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)),
    )


def gemma() -> tuple[Any, Any]:
    text = TEXT | {"head_dim": 8}
    vision = SMALL | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    return (
        transformers.Gemma3ForConditionalGeneration(config),
        transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**text)),
    )


def llava() -> tuple[Any, Any]:
    vision = SMALL | {"num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=5,
    )
    return (
        transformers.LlavaForConditionalGeneration(config),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    )


@pytest.fixture(scope="module", params=[qwen, gemma, llava], ids=lambda build: build.__name__)
def multimodal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A multimodal base, and an adapter of a text model of the same sizes."""
    root = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    both, text = request.param()
    both.save_pretrained(root / "base")
    text.save_pretrained(root / "text")
    made.save_adapter(root / "text", root / "adapter", 1, target_modules=PROJECTIONS)
    return root / "base", root / "adapter"


def content(base: Path, adapter: Path) -> dict[str, Any]:
    return made.recipe(base, [f"{base}+{adapter}"], parameters={"lambda": 1.0})


def recipe(base: Path, adapter: Path) -> Any:
    return check_recipe(made.yaml.safe_dump(content(base, adapter)))


def by_lora(base: Path, adapter: Path, out: Path) -> None:
    merged(content(base, adapter), out)


def by_merge(base: Path, adapter: Path, out: Path) -> None:
    merge_recipe(recipe(base, adapter), out, QUIET)


def by_plan(base: Path, adapter: Path, out: Path) -> None:
    make_plan(recipe(base, adapter), out, QUIET)


def by_yaml(base: Path, adapter: Path, out: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers, called by the host
        run_yaml(base, adapter, out)


def run_yaml(base: Path, adapter: Path, out: Path) -> None:
    merging.merge(content(base, adapter), out, "--lora-merge-cache", str(out.with_suffix(".cache")))


ROUTES = [by_lora, by_merge, by_plan, by_yaml]
Route = Callable[[Path, Path, Path], None]


def updates(adapter: Path) -> dict[str, Tensor]:
    """Return ``8 / 3 B A`` by the part of a module's name from ``layers`` on."""
    stored = {k.partition(".layers.")[2]: v for k, v in made.tensors(adapter).items()}
    modules = {name.partition(".lora_")[0] for name in stored}
    return {m: 8 / 3 * stored[f"{m}.lora_B.weight"] @ stored[f"{m}.lora_A.weight"] for m in modules}


def assert_text_is_changed(base: Path, adapter: Path, out: Path) -> None:
    before, after, change = made.tensors(base), made.tensors(out), updates(adapter)
    assert set(before) == set(after)
    seen = 0
    for name, tensor in before.items():
        module = name.partition(".layers.")[2].removesuffix(".weight")
        if module in change and "vision" not in name and "visual" not in name:
            seen += 1
            torch.testing.assert_close(after[name] - tensor, change[module], rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(after[name], tensor), name
    assert seen == len(change) == 4


@pytest.mark.parametrize("route", [by_lora, by_merge])
def test_text_adapter_changes_the_text_part(
    multimodal: tuple[Path, Path], route: Route, tmp_path: Path
) -> None:
    base, adapter = multimodal
    route(base, adapter, tmp_path / "out")
    assert_text_is_changed(base, adapter, tmp_path / "out")


def test_written_adapter_has_the_names_of_the_multimodal_model(
    multimodal: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = multimodal
    merged(content(base, adapter), tmp_path / "one", adapter=True)
    made.save_full(base, tmp_path / "one", tmp_path / "full")
    assert_text_is_changed(base, adapter, tmp_path / "full")


def test_mergekit_yaml_is_stopped_before_it_merges(
    multimodal: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = multimodal
    with pytest.raises(STFError, match=r"lacks model\.layers\.0\.self_attn.*mergekit-stf merge"):
        by_yaml(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("build", "target"),
    [(llama, "q_proj"), (gpt2, "c_attn"), (t5, "q")],
    ids=["llama", "gpt2", "t5"],
)
def test_adapter_that_fills_nothing_is_refused(
    build: Callable[[], Any], target: str, route: Route, tmp_path: Path
) -> None:
    base = save_model(build(), tmp_path, tasks=0).base
    adapter = made.save_adapter(base, tmp_path / "adapter", 1, target_modules=[target])
    file = adapter / "adapter_model.safetensors"
    stored = {name.replace(f".{target}.", ".q_other."): t for name, t in load_file(file).items()}
    save_file(stored, file)
    with pytest.raises(STFError, match=rf"{adapter} changes .*q_other.*another base"):
        route(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, Path]:
    """A causal model, and an adapter that was trained as a classifier of three classes."""
    base = save_model(llama(), tmp_path, tasks=0).base
    with_head = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    with_head.save_pretrained(tmp_path / "with_head")
    adapter = made.save_adapter(
        tmp_path / "with_head",
        tmp_path / "adapter",
        1,
        target_modules=["q_proj"],
        task_type="SEQ_CLS",
    )
    return base, adapter


@pytest.mark.parametrize("route", ROUTES)
def test_head_is_never_lost(classifier: tuple[Path, Path], route: Route, tmp_path: Path) -> None:
    base, adapter = classifier
    with pytest.raises(STFError) as caught:
        route(base, adapter, tmp_path / "out")
    words = "transformers.AutoModelForSequenceClassification.from_pretrained"
    assert f"score.weight: the base {base} has no weight of that name" in str(caught.value)
    assert f"{words}('{base}', num_labels=3).save_pretrained(DIR)" in str(caught.value)
    assert "mergekit-yaml" not in str(caught.value)


@pytest.mark.parametrize("route", [by_lora, by_merge, by_yaml])
def test_head_arrives_on_the_base_that_the_error_recommends(
    classifier: tuple[Path, Path], route: Route, tmp_path: Path
) -> None:
    route(tmp_path / "with_head", classifier[1], tmp_path / "out")
    stored = load_file(classifier[1] / "adapter_model.safetensors")
    found = made.tensors(tmp_path / "out")["score.weight"]
    torch.testing.assert_close(found, stored["base_model.model.score.weight"])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]


def test_only_modules_with_factors_are_merged(tmp_path: Path) -> None:
    """The configuration names k_proj too, which PEFT would start at random."""
    base = save_model(llama(), tmp_path, tasks=0).base
    adapter = made.save_adapter(
        base, tmp_path / "a", 1, target_modules=["q_proj", "k_proj"], init_lora_weights=False
    )
    file = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "k_proj" not in k}, file)
    by_merge(base, adapter, tmp_path / "out")
    before, after = made.tensors(base), made.tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
    with pytest.raises(STFError, match="k_proj"):
        by_yaml(base, adapter, tmp_path / "yaml")


def test_ranks_and_scales_of_modules_survive_other_names(tmp_path: Path) -> None:
    """Patterns that are anchored to the text model's names, and a head that is stored whole."""
    torch.manual_seed(0)
    both, text = llava()
    both.save_pretrained(tmp_path / "base")
    text.save_pretrained(tmp_path / "text")
    adapter = made.save_adapter(
        tmp_path / "text", tmp_path / "adapter", 1, target_modules=["q_proj", "up_proj"],
        rank_pattern={"^model.layers.1.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3},
        modules_to_save=["lm_head"], use_dora=True,
    )  # fmt: skip
    made.save_full(tmp_path / "text", adapter, tmp_path / "full")
    by_merge(tmp_path / "base", adapter, tmp_path / "out")
    found = made.load(tmp_path / "out").state_dict()
    start = made.load(tmp_path / "base").state_dict()
    want, was = (made.load(tmp_path / name).state_dict() for name in ("full", "text"))
    assert not torch.equal(want["lm_head.weight"], was["lm_head.weight"])
    torch.testing.assert_close(found["lm_head.weight"], want["lm_head.weight"])
    assert start.keys() == found.keys()


def test_directory_of_copies_is_used_again(multimodal: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = multimodal
    options = QUIET.model_copy(update={"lora_merge_cache": str(tmp_path / "cache")})
    merge_recipe(recipe(base, adapter), tmp_path / "one", options)
    (copy,) = (tmp_path / "cache").iterdir()
    before = copy.stat().st_mtime_ns
    merge_recipe(recipe(base, adapter), tmp_path / "two", options)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [before]
    assert_text_is_changed(base, adapter, tmp_path / "two")


def known(**shapes: tuple[int, ...]) -> KnownWeights:
    names = {name.replace("_", "."): shape for name, shape in shapes.items()}
    return KnownWeights(names, {name: name for name in names}, None)


def test_prefixes_that_are_not_safe_are_not_taken() -> None:
    wanted = {"m.l.0.q": (4, 4), "m.l.1.q": (4, 4)}
    one = {"m_t_l_0_q": (4, 4), "m_t_l_1_q": (4, 4)}
    found = {"m.l.0.q": "m.t.l.0.q", "m.l.1.q": "m.t.l.1.q"}
    assert resolve(wanted, known(**one)) == found
    assert resolve(wanted, known(**one, v_l_0_q=(4, 4))) == found
    assert resolve(wanted, known(**one, v_l_0_q=(4, 4), v_l_1_q=(4, 5))) == found
    assert resolve(wanted, known(**one, v_l_0_q=(4, 4), v_l_1_q=(4, 4))) is None
    assert resolve(wanted, known(m_t_l_0_q=(4, 4), m_t_l_1_q=(5, 4))) is None
    assert resolve(wanted, known(m_t_l_0_q=(4, 4))) is None
    assert resolve({"m.l.1.q": (4, 4)}, known(m_l_0_q=(4, 4))) is None
    assert resolve(wanted, known(m_l_0_q=(4, 4), v_l_1_q=(4, 4))) is None
