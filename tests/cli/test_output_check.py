"""The check of every output: complete, finite, its configuration true, or nothing is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.io.tasks import SaveTensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_stf.host.checkpoints.files import sha256_of
from mergekit_stf.host.outputs.check import OutputCheck
from tests.cli.merges import run, write_recipe
from tests.host import peft_adapters as made
from tests.host.merging import reload
from tests.host.models import Checkpoints, gpt2, llama, save_family, save_model, t5_v1_1

DROPPED = {
    "llama": "model.layers.1.mlp.up_proj.weight",
    "gpt2": "transformer.h.0.attn.c_attn.bias",
    "t5": "decoder.block.0.layer.1.EncDecAttention.q.weight",
    "mixtral": "model.norm.weight",
}
Change = Callable[[str, Tensor], Tensor | None]


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Let the host change or drop tensors while it writes them."""
    save = SaveTensor.execute

    def install(change: Change) -> None:
        def execute(self: SaveTensor, writer: Any, tensor: Tensor) -> None:
            if (changed := change(self.tensor_name, tensor)) is not None:
                save(self, writer, changed)

        monkeypatch.setattr(SaveTensor, "execute", execute)

    return install


def check_of(out: Path) -> OutputCheck:
    lock = json.loads((out / "stf.lock.json").read_text())
    return OutputCheck.model_validate(lock["check"])


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def merge(models: Checkpoints, root: Path, extra: str = "", *options: str) -> Path:
    recipe = write_recipe(root / "r.yml", models)
    recipe.write_text(recipe.read_text() + extra)
    done = run("merge", recipe, root / "out", *options)
    assert done.exit_code == 0, done.output
    return root / "out"


def refused(models: Checkpoints, root: Path) -> str:
    done = run("merge", write_recipe(root / "r.yml", models), root / "out", "--quiet")
    assert done.exit_code == 1, done.output
    assert not (root / "out").exists()
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    return line


@pytest.mark.parametrize(("family", "parameters"), [("llama", 21), ("gpt2", 28), ("t5", 47)])
def test_what_the_check_says_is_told_everywhere(
    family: str, parameters: int, tmp_path: Path
) -> None:
    models = save_family(family, tmp_path / "models", tasks=2)
    done = run("merge", write_recipe(tmp_path / "r.yml", models), tmp_path / "out")
    config = json.loads((models.base / "config.json").read_text())
    (model_class,) = config["architectures"]
    summary = (
        f"{parameters} tensors fill {parameters} parameters of {model_class}, "
        "and all values are finite"
    )
    assert f"{tmp_path / 'out'}: {summary}" in done.output.splitlines()
    check = check_of(tmp_path / "out")
    assert check.summary == summary
    assert not [*check.notices()]
    assert summary in run("verify", tmp_path / "out").output
    assert run("report", tmp_path / "out", "--sample", "0", "--quiet").exit_code == 0
    page = (tmp_path / "out" / "stf-report.html").read_text()
    assert f"Output: {summary}." in page


@pytest.mark.parametrize(("family", "name"), list(DROPPED.items()))
def test_an_output_that_lacks_a_parameter_is_not_published(
    family: str,
    name: str,
    tmp_path: Path,
    writing: Callable[[Change], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = save_family(family, tmp_path / "models", tasks=2)
    writing(lambda found, tensor: None if found == name else tensor)
    assert f"no tensor fills {name}" in refused(models, tmp_path)
    monkeypatch.setenv("MERGEKIT_STF_ALLOW_LOSS", "1")
    assert list(check_of(merge(models, tmp_path)).unfilled) == [name]


@pytest.mark.parametrize(("family", "name"), list(DROPPED.items()))
def test_an_output_that_is_not_finite_is_not_published(
    family: str, name: str, tmp_path: Path, writing: Callable[[Change], None]
) -> None:
    models = save_family(family, tmp_path / "models", tasks=2)

    def broken(found: str, tensor: Tensor) -> Tensor:
        return tensor * torch.inf if found == name else tensor

    writing(broken)
    assert f"{name}: the output has entries that are NaN or infinite" in refused(models, tmp_path)


def test_a_shape_that_the_configuration_does_not_say_is_refused(
    tmp_path: Path, writing: Callable[[Change], None]
) -> None:
    models = save_family("gpt2", tmp_path / "models", tasks=2)
    writing(lambda name, tensor: tensor[:, :-1] if name.endswith("wpe.weight") else tensor)
    line = refused(models, tmp_path)
    assert "transformer.wpe.weight is (32, 15), and the configuration asks for (32, 16)" in line


def test_what_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path / "models", tasks=2)

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    for folder in (models.base, *models.tuned):
        edit_weights(folder, add)
    check = check_of(merge(models, tmp_path))
    kinds = "model.layers.*.self_attn.rotary_emb.inv_freq (2)"
    assert check.left_out == {"the model's class has no use for them": kinds}
    assert check.tensors == 21


def test_layers_that_slices_leave_out_are_no_loss(tmp_path: Path) -> None:
    models = save_model(llama(num_hidden_layers=3), tmp_path / "models", tasks=1)
    sources = "".join(
        f"      - {{model: {folder}, layer_range: [0, 2]}}\n"
        for folder in (models.base, *models.tuned)
    )
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: stf\nbase_model: {models.base}\nslices:\n  - sources:\n{sources}"
    )
    done = run("merge", recipe, tmp_path / "out")
    assert done.exit_code == 0, done.output
    check = check_of(tmp_path / "out")
    assert check.parameters == 21
    assert list(check.left_out) == ["the recipe's slices leave out their layers"]
    assert "mlp.up_proj.weight (1)" in str(check.left_out)


def test_a_base_that_lacks_a_parameter_is_told_and_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = save_model(llama(tie_word_embeddings=True), tmp_path / "models", tasks=2)
    for folder in (models.base, *models.tuned):
        edit_json(folder / "config.json", tie_word_embeddings=False)
    out = merge(models, tmp_path)
    assert list(check_of(out).unfilled) == ["lm_head.weight"]
    assert any("no tensor fills lm_head.weight" in r.message for r in caplog.records)
    assert run("verify", out).exit_code == 0


@pytest.mark.parametrize(
    ("family", "linear", "mask"),
    [
        ("gpt2", made.GPT2_LINEAR, "transformer.h.{}.attn.masked_bias"),
        ("llama", made.LLAMA_LINEAR, "model.layers.{}.self_attn.masked_bias"),
        ("mixtral", ["q_proj"], "model.layers.{}.self_attn.masked_bias"),
    ],
)
def test_an_infinite_mask_of_the_base_does_not_make_a_model_unmergeable(
    family: str, linear: list[str], mask: str, tmp_path: Path
) -> None:
    """Old versions of transformers stored such masks; a merge of full models leaves them out."""
    models = save_family(family, tmp_path / "models", tasks=1)
    more = {"target_modules": linear, "fan_in_fan_out": family == "gpt2"}
    adapter = made.save_adapter(models.base, tmp_path / "a", 1, **more)
    masks = {mask.format(layer): torch.tensor(float("-inf")) for layer in range(2)}
    for folder in (models.base, *models.tuned):
        edit_weights(folder, lambda tensors: tensors.update(masks))
    kinds = f"{mask.format('*')} (2)"
    check = check_of(merge(models, tmp_path))
    assert check.left_out == {"the model's class has no use for them": kinds}
    recipe = made.write(
        made.recipe(models.base, made.on_base(models.base, [adapter])), tmp_path / "lora.yml"
    )
    done = run("lora", recipe, tmp_path / "lora", "--lock")
    assert done.exit_code == 0, done.output
    assert check_of(tmp_path / "lora").infinite == tuple(masks)
    written = load_file(tmp_path / "lora" / "model.safetensors")
    assert all(written[name].item() == float("-inf") for name in masks)
    result = run("verify", tmp_path / "lora")
    assert result.exit_code == 0
    assert f"all values are finite, but for {kinds}, as in the base" in result.output


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_verify_looks_at_values_and_not_only_at_digests(family: str, tmp_path: Path) -> None:
    out = merge(save_family(family, tmp_path / "models", tasks=2), tmp_path)
    name = DROPPED[family]

    def forge(change: Callable[[dict[str, Tensor]], None]) -> None:
        edit_weights(out, change)
        lock = json.loads((out / "stf.lock.json").read_text())
        (record,) = [r for r in lock["outputs"] if r["name"] == "model.safetensors"]
        record["sha256"] = sha256_of(out / "model.safetensors")
        record["size"] = (out / "model.safetensors").stat().st_size
        (out / "stf.lock.json").write_text(json.dumps(lock))

    forge(lambda tensors: tensors[name].fill_(torch.inf))
    result = run("verify", out)
    assert result.exit_code == 3
    assert f"output {name} has entries that are NaN or infinite" in result.output
    forge(lambda tensors: tensors.pop(name))
    result = run("verify", out)
    assert result.exit_code == 3
    assert f"output no tensor fills {name}" in result.output


def test_a_report_on_infinite_weights_warns(tmp_path: Path) -> None:
    out = merge(save_family("llama", tmp_path / "models", tasks=2), tmp_path)
    edit_json(out / "stf.lock.json", check=None)
    edit_weights(out, lambda tensors: tensors[DROPPED["llama"]].fill_(torch.nan))
    done = run("report", out, "--sample", "0", "--quiet")
    assert ", 1 warnings" in done.output
    page = (out / "stf-report.html").read_text()
    assert f"{DROPPED['llama']} has entries that are NaN or infinite" in page


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5"])
def test_a_head_of_its_own_is_not_tied(case: str, tmp_path: Path) -> None:
    """transformers 4 would tie the head to the embedding and drop what was merged."""
    make = {
        "llama": lambda: llama(tie_word_embeddings=True),
        "gpt2": gpt2,
        "t5": t5_v1_1,
    }
    models = save_model(make[case](), tmp_path / "models", tasks=2)
    embeddings = {
        "llama": "model.embed_tokens.weight",
        "gpt2": "transformer.wte.weight",
        "t5": "shared.weight",
    }
    for number, folder in enumerate((models.base, *models.tuned), start=1):
        tensors = load_file(folder / "model.safetensors")  # transformers saves no tied head
        tensors["lm_head.weight"] = tensors[embeddings[case]] * number
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = merge(models, tmp_path)
    settings = json.loads((out / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    written = load_file(out / "model.safetensors")
    model = reload(out, getattr(transformers, settings["architectures"][0]))
    assert torch.equal(model.get_output_embeddings().weight, written["lm_head.weight"])
    assert not torch.equal(
        model.get_output_embeddings().weight, model.get_input_embeddings().weight
    )


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    models = save_model(llama(tie_word_embeddings=True), tmp_path / "models", tasks=2)
    settings = json.loads((merge(models, tmp_path) / "config.json").read_text())
    assert settings["tie_word_embeddings"] is True


@pytest.mark.parametrize(("family", "extra", "dtype"), [
    ("llama", "out_dtype: float16\n", "float16"),
    ("gpt2", "", "float32"),
    ("bert", "dtype: float32\nout_dtype: bfloat16\n", "bfloat16"),
])  # fmt: skip
def test_the_configuration_says_what_is_written(
    family: str, extra: str, dtype: str, tmp_path: Path
) -> None:
    models = save_family(family, tmp_path / "models", tasks=2)
    edit_json(
        models.base / "config.json",
        dtype="float64",
        quantization_config={"quant_method": "fp8", "dequantize": True},
    )
    settings = json.loads((merge(models, tmp_path, extra) / "config.json").read_text())
    assert settings["dtype"] == dtype
    assert "quantization_config" not in settings


def test_the_vocabulary_is_as_long_as_the_embedding(tmp_path: Path) -> None:
    models = save_family("llama", tmp_path / "models", tasks=2)
    edit_json(models.base / "config.json", vocab_size=39)
    out = merge(models, tmp_path)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 40
    reload(out, transformers.LlamaForCausalLM)


@pytest.mark.parametrize(
    "extra",
    ["", "tokenizer_source: base\n", "tokenizer: {source: union}\n", "chat_template: chatml\n"],
)
def test_defaults_and_code_come_along_on_every_route(extra: str, tmp_path: Path) -> None:
    models = save_family("llama", tmp_path / "models", tasks=2)
    for folder in (models.base, *models.tuned):
        save_tokenizer(folder)
        (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
        (folder / "modeling_own.py").write_text("raise RuntimeError('was run')\n")
        edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    out = merge(models, tmp_path, extra)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert (out / "modeling_own.py").read_text() == "raise RuntimeError('was run')\n"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 40
    assert "modeling_own.py" in (out / "stf.lock.json").read_text()


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 40)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def test_an_index_must_agree_with_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_family("llama", tmp_path / "models", tasks=2)
    out = merge(models, tmp_path, "", "--out-shard-size", "4K")
    (index,) = out.glob("*.index.json")
    assert check_of(out).tensors == 21
    places = json.loads(index.read_text())
    places["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(places))
    lock = json.loads((out / "stf.lock.json").read_text())
    (record,) = [r for r in lock["outputs"] if r["name"] == index.name]
    record |= {"sha256": sha256_of(index), "size": index.stat().st_size}
    (out / "stf.lock.json").write_text(json.dumps(lock))
    result = run("verify", out)
    assert result.exit_code == 1
    assert "model.norm.weight" in result.output
    assert "the index does not name it" in result.output


def test_adapters_get_the_same_check(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path, tasks=0).base
    shutil.copy(base / "config.json", tmp_path / "config.json")
    edit_json(base / "config.json", dtype="float64")
    adapter = made.save_adapter(base, tmp_path / "a", 1, target_modules=["q_proj"])
    content = made.recipe(base, made.on_base(base, [adapter]))
    recipe = made.write(content, tmp_path / "r.yml")
    done = run("lora", recipe, tmp_path / "out", "--lock")
    assert done.exit_code == 0, done.output
    assert check_of(tmp_path / "out").parameters == 21
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "fill 21 parameters of LlamaForCausalLM" in run("verify", tmp_path / "out").output
    done = run("lora", recipe, tmp_path / "adapter", "--adapter", "--lock")
    assert done.exit_code == 0, done.output
    assert "all values are finite" in run("verify", tmp_path / "adapter").output
