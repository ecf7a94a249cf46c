"""``mergekit-stf merge``: what it checks, what it writes, what it leaves alone."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mergekit_stf.cli.main import main
from mergekit_stf.host.provenance.lock import file_record, output_names, read_lock, write_lock
from mergekit_stf.host.run import merge as merging
from mergekit_stf.host.run.merge import OrderedConfiguration
from tests.host.models import Checkpoints, lay_out, save_family
from tests.host.peft_adapters import save_adapter

ENTRIES = "*.stf.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_family("llama", tmp_path_factory.mktemp("models"), tasks=2)


@pytest.fixture
def models(shared: Checkpoints, tmp_path: Path) -> Checkpoints:
    root = tmp_path / "some models"
    shutil.copytree(shared.base.parent, root)
    return Checkpoints(root / shared.base.name, tuple(root / t.name for t in shared.tuned))


def text_of(
    models: Checkpoints, extra: str = "", method: str = "stf", reverse: bool = False
) -> str:
    tuned = models.tuned[::-1] if reverse else models.tuned
    listed = "".join(f"  - {{model: {model}, parameters: {{weight: 1.0}}}}\n" for model in tuned)
    return f"merge_method: {method}\nbase_model: {models.base}\nmodels:\n{listed}{extra}"


@pytest.fixture
def recipe(models: Checkpoints, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(text_of(models))
    return path


def merge(recipe: Path, out: Path, *options: object) -> Result:
    return CliRunner().invoke(main, ["merge", str(recipe), str(out), *map(str, options)])


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def change(model: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("method", ["stf", "ties"])
def test_the_weights_are_those_of_the_host(
    models: Checkpoints, tmp_path: Path, method: str, layout: str
) -> None:
    for model in (models.base, *models.tuned):
        lay_out(model, layout)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text_of(models, "parameters: {lambda: 0.9}\n", method))
    result = merge(recipe, tmp_path / "deep" / "out")
    assert result.exit_code == 0, result.output
    settings = {"merge_method": method, "base_model": str(models.base)}
    settings["models"] = [{"model": str(m), "parameters": {"weight": 1.0}} for m in models.tuned]
    settings["parameters"] = {"lambda": 0.9}
    plain = MergeConfiguration.model_validate(settings)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False)
    run_merge(plain, str(tmp_path / "plain"), options)
    merged, expected = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "deep" / "out", tmp_path / "plain")
    )
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert (tmp_path / "deep" / "out" / "mergekit_config.yml").read_text() == recipe.read_text()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_order_of_models_costs_no_byte(models: Checkpoints, tmp_path: Path) -> None:
    for name, reverse in (("a", False), ("b", True)):
        (tmp_path / f"{name}.yml").write_text(text_of(models, reverse=reverse))
        assert merge(tmp_path / f"{name}.yml", tmp_path / name).exit_code == 0
    first, second = (tmp_path / name / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_an_output_is_not_overwritten_unless_told(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert merge(recipe, out).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    assert refused(merge(recipe, out)).endswith(
        "is there already; name another folder, or say --force"
    )
    recipe.write_text(recipe.read_text() + "parameters: {lambda: 0.1}\n")
    (out / "extra").touch()
    assert "out holds extra, which" in refused(merge(recipe, out, "--force"))
    (out / "extra").unlink()
    assert merge(recipe, out, "--force").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != before
    (tmp_path / "file").touch()
    assert refused(merge(recipe, tmp_path / "file", "--force")).endswith("is a file; name a folder")


def test_an_empty_output_is_an_error(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, command in (("merge", []), ("lora", []), ("sweep", ["--lambda", "1"]), ("demo", [])):
        files = [str(recipe)] * (name != "demo")
        force = ["--force"] * (name != "sweep")
        result = CliRunner().invoke(main, [name, *files, "", *command, *force])
        assert result.exit_code == 2, (name, result.output)
        assert "it is empty; a variable of the shell may not be set" in result.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["base", "tuned", "models", "recipe", "linked file"])
@pytest.mark.parametrize("lora", [False, True])
def test_force_replaces_nothing_that_the_merge_reads(
    models: Checkpoints, recipe: Path, tmp_path: Path, place: str, lora: bool
) -> None:
    """Each of these folders is made to look like an earlier output."""
    earlier = tmp_path / "earlier"
    assert merge(recipe, earlier).exit_code == 0
    out = {"base": models.base, "tuned": models.tuned[1], "models": models.base.parent}.get(place)
    if place == "recipe":
        out, recipe = earlier, earlier / "mergekit_config.yml"
    elif place == "linked file":
        out = earlier
        (models.base / "model.safetensors").unlink()
        (models.base / "model.safetensors").symlink_to(earlier / "model.safetensors")
    assert out is not None
    if out != earlier:
        settle_lock(earlier, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = "lora" if lora else "merge"
    line = refused(CliRunner().invoke(main, [command, str(recipe), str(out), "--force"]))
    assert line.startswith(f"{out} ")
    assert line.endswith("which this merge uses; name another folder")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def settle_lock(earlier: Path, folder: Path) -> None:
    """Make a lock that names all files of a folder."""
    lock = read_lock(earlier)
    outputs = tuple(file_record(folder, name) for name in output_names(folder))
    write_lock(lock.model_copy(update={"outputs": outputs}), folder)


def test_what_appears_at_the_output_while_a_merge_runs_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def while_merging(*arguments: object) -> None:
        out.mkdir()
        (out / "precious").write_text("written by somebody else")
        run_merge(*arguments)

    monkeypatch.setattr(merging, "run_merge", while_merging)
    line = refused(merge(recipe, out))
    assert line.startswith(f"the finished output lies in {out}.new: {out} is there already")
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert CliRunner().invoke(main, ["verify", f"{out}.new"]).exit_code == 0
    assert not (tmp_path / "out.stf-work").exists()


def test_a_failure_leaves_the_old_output_alone(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert merge(recipe, out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(models.tuned[1] / "model.safetensors")[name]
    tensor[1, 1] = torch.nan
    change(models.tuned[1], name, tensor)
    line = refused(merge(recipe, out, "--force"))
    assert name in line
    assert "NaN" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_shapes_are_checked_before_the_merge(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change(models.tuned[0], name, torch.zeros(3, 5))
    line = refused(merge(recipe, tmp_path / "out"))
    assert line.startswith(f"{name}: {models.tuned[0]} has shape (3, 5), the base has (24, 16)")
    assert not (tmp_path / "out.stf-work").exists()


def test_a_missing_tensor_is_seen_before_the_merge(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    change(models.tuned[0], "model.layers.1.mlp.up_proj.weight", None)
    line = refused(merge(recipe, tmp_path / "out"))
    assert line.startswith(f"{models.tuned[0]}: ")
    assert "mlp.up_proj.weight" in line
    assert not (tmp_path / "out.stf-work").exists()


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../../secret"}}'])
def test_a_hostile_index_is_refused(
    models: Checkpoints, recipe: Path, tmp_path: Path, index: str
) -> None:
    (models.tuned[0] / "model.safetensors.index.json").write_text(index)
    line = refused(merge(recipe, tmp_path / "out"))
    assert "index.json is damaged" in line or "'../../secret' is no file name inside" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read: Expecting value"),
        ("[" * 100_000, "cannot be read: "),
        ("[]", "expected a mapping with 'model_type'"),
        ('{"model_type": 3}', "expected a mapping with 'model_type'"),
        ('{"model_type": "llama"}', "'architectures' should name one class; got None"),
        ('{"model_type": "llama", "architectures": []}', "should name one class; got []"),
        ('{"model_type": "nope", "architectures": ["Nope"]}', "model type `nope`"),
        (
            '{"model_type": "x", "architectures": ["X"], "auto_map": {"AutoConfig": "evil.E"}}',
            "contains custom code",
        ),
    ],
)
def test_a_hostile_configuration_is_refused(
    models: Checkpoints, recipe: Path, tmp_path: Path, text: str, expected: str
) -> None:
    for model in (models.base, *models.tuned):
        (model / "config.json").write_text(text)
        (model / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    assert expected in refused(merge(recipe, tmp_path / "out"))
    assert not (tmp_path / "run").exists()


def test_a_model_without_weights_or_configuration(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    (models.base / "config.json").rename(tmp_path / "config.json")
    assert "config.json" in refused(merge(recipe, tmp_path / "out"))
    (tmp_path / "config.json").rename(models.base / "config.json")
    (models.base / "model.safetensors").unlink()
    line = refused(merge(recipe, tmp_path / "out"))
    assert line.startswith(f"{models.base} holds no weights; expected model.safetensors or ")


def test_a_folder_with_nothing_but_a_tokenizer(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    words = {f"w{index}": index for index in range(40)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    for folder in (tmp_path / "words", models.base, *models.tuned):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    recipe.write_text(text_of(models, f"tokenizer: {{source: {tmp_path / 'words'}}}\n"))
    result = merge(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    lock = json.loads((tmp_path / "out" / "stf.lock.json").read_text())
    files = {model["reference"]: model["files"] for model in lock["models"]}
    assert "tokenizer.json" in [file["name"] for file in files[str(tmp_path / "words")]]
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_adapters_need_no_cache_of_the_users(
    models: Checkpoints, recipe: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(models.base, tmp_path / "adapter", 1, target_modules=["q_proj"])
    text = recipe.read_text().replace(f"{models.tuned[0]},", f"{models.base}+{adapter},")
    recipe.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        result = merge(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out.stf-work").exists()
    lock = json.loads((tmp_path / "out" / "stf.lock.json").read_text())
    files = {model["reference"]: model["files"] for model in lock["models"]}
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert [file["name"] for file in files[str(adapter)]] == names


def test_the_environment_names_a_store_for_the_host(
    models: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_STF_STORE", str(tmp_path / "store"))
    config = MergeConfiguration.model_validate(yaml.safe_load(text_of(models)))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False)
    written = []
    for name in ("first", "second"):
        run_merge(config.model_copy(deep=True), str(tmp_path / name), options)
        entries = (tmp_path / "store").glob(ENTRIES)
        written.append(sorted((path.name, path.stat().st_ino) for path in entries))
    assert len(written[0]) == 14
    assert written[0] == written[1]
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_kept_store_serves_another_lambda(recipe: Path, tmp_path: Path) -> None:
    result = merge(recipe, tmp_path / "out", "--keep-store")
    assert "0 matrices found, 14 written" in result.output
    before = load_file(tmp_path / "out" / "model.safetensors")
    recipe.write_text(recipe.read_text() + "parameters: {lambda: 0.1}\n")
    result = merge(recipe, tmp_path / "out", "--force")
    assert "14 matrices found, 0 written" in result.output
    assert not (tmp_path / "out.stf-work").exists()
    assert merge(recipe, tmp_path / "again").exit_code == 0
    swept, fresh = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert swept.read_bytes() == fresh.read_bytes()
    assert any(not torch.equal(before[name], x) for name, x in load_file(swept).items())


def test_a_small_store_is_said(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = merge(recipe, tmp_path / "out", "--store", tmp_path / "store", "--store-size", "4K")
    assert result.exit_code == 0, result.output
    assert caplog.text.count("store is full") == 1
    assert sum(path.stat().st_size for path in (tmp_path / "store").iterdir()) <= 4000


@pytest.mark.parametrize("wrong", ["", "x", "12Q", "-3", "1.5G", "KM"])
def test_a_size_that_is_none(recipe: Path, tmp_path: Path, wrong: str) -> None:
    result = merge(recipe, tmp_path / "out", "--store-size", wrong)
    assert result.exit_code == 2
    assert "is no size; write for example 500M or 20G" in result.output


def test_what_has_no_effect_is_said(
    models: Checkpoints, recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = "parameters: {rule: [{filter: self_atn, value: sum}], normalize: true}\n"
    recipe.write_text(text_of(models, extra))
    result = merge(recipe, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"Warning: {recipe}: line 6, parameters.normalize: ignored" in result.output
    assert "filter 'self_atn' matches no weight, so its value is never used" in caplog.text
    assert "has no tokenizer, so none is written" in caplog.text


def test_little_memory_is_said(
    recipe: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Little)
    assert merge(recipe, tmp_path / "out").exit_code == 0
    assert "of memory needed, 1 kB free; --out-shard-size 1B lowers the need" in caplog.text


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("my model-1.0_b", "my model-1.0_b"),
        ("<b>out", "`<b>out`"),
        ("[x](http:evil)", "`[x](http:evil)`"),
        ("a\r\n# b`c", "`` a\\r\\n# b`c ``"),
    ],
)
def test_the_card_is_escaped_and_lists_everything(
    models: Checkpoints, tmp_path: Path, name: str, title: str
) -> None:
    tuned = models.tuned[1].rename(models.base.parent / "[y](z)\r# w")
    models = Checkpoints(models.base, (models.tuned[0], tuned))
    recipe = tmp_path / "recipe.yml"
    text = text_of(models).replace(str(tuned), json.dumps(str(tuned)))
    recipe.write_bytes((text + "# ```\r# <script>\r\n").encode())
    assert merge(recipe, tmp_path / name).exit_code == 0
    raw = (tmp_path / name / "README.md").read_bytes()
    assert b"\r" not in raw
    card = raw.decode()
    assert f"# {title}\n" in card
    assert "````yaml\nmerge_method: stf" in card
    assert card.rstrip().endswith("# ```\n# <script>\n````")
    names = (str(models.base), str(models.tuned[0]), str(tuned).replace("\r", "\\r"))
    listed = [line for line in card.splitlines() if line.startswith("- ") and line[2] in "`b"]
    assert listed[0] == f"- base: `{names[0]}`"
    assert listed[1:] == sorted(f"- `{name}`" for name in names[1:])


def test_the_lock_names_everything(models: Checkpoints, recipe: Path, tmp_path: Path) -> None:
    assert merge(recipe, tmp_path / "out", "--num-threads", torch.get_num_threads()).exit_code == 0
    lock = json.loads((tmp_path / "out" / "stf.lock.json").read_text())
    assert [model["reference"] for model in lock["models"]] == sorted(
        str(model) for model in (models.base, *models.tuned)
    )
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert [file["name"] for file in lock["models"][0]["files"]] == names
    assert [file["name"] for file in lock["outputs"]] == sorted(
        path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("stf")
    )
    assert lock["versions"]["torch"] == torch.__version__
    assert lock["threads"] == torch.get_num_threads()
    assert lock["device"] == "cpu"


def test_the_host_goes_through_the_models_in_one_order() -> None:
    names = [f"some/model{index}" for index in range(9)]
    settings = {"merge_method": "stf", "base_model": names[8]}
    settings["models"] = [{"model": name} for name in names[7::-1]]
    config = OrderedConfiguration.model_validate(settings)
    assert [str(model) for model in config.model_copy(deep=True).referenced_models()] == names
