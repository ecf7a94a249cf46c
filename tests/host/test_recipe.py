"""Checks of a recipe: every mistake is found, named and located; good recipes pass."""

import tracemalloc
from pathlib import Path

import pytest

from mergekit_stf.core import methods
from mergekit_stf.core.errors import STFError
from mergekit_stf.host.plugin.parameters import parameters_of
from mergekit_stf.host.recipe.recipe import Recipe, check_recipe, load_recipe


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


def recipe(models: Path, extra: str = "", of_a: str = "", method: str = "stf") -> str:
    return f"""merge_method: {method}
base_model: {models}/base
models:
  - model: {models}/a
    parameters: {{weight: 1.0{of_a}}}
  - model: {models}/b
    parameters: {{weight: 0.5, density: 0.2}}
{extra}"""


def problems(text: str) -> list[str]:
    with pytest.raises(STFError) as caught:
        check_recipe(text, "r.yml")
    lines = str(caught.value).splitlines()
    return lines if len(lines) == 1 else [line.strip() for line in lines[1:]]


GOOD = [
    "",
    "parameters: {lambda: 0.7, rank: 0.5, ridge: auto, rule: auto}",
    "parameters: {rank: 16, ridge: 1e-3, lambda: [0.1, 0.9, 0.5]}",
    "parameters: {rule: [{filter: lm_head, value: base}, {value: auto}]}",
    "parameters: {density: {filter: mlp, value: [0.1, 1]}}",
    "dtype: bfloat16\nout_dtype: float32",
    "tokenizer: {source: base, pad_to_multiple_of: 8}",
]


@pytest.mark.parametrize("extra", GOOD)
def test_good_recipes_pass(models: Path, extra: str) -> None:
    text = recipe(models, extra)
    result = check_recipe(text, "r.yml")
    assert isinstance(result, Recipe)
    assert result.text == text
    assert result.config.merge_method == "stf"
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "parameters: {lamda: 7}",
            "parameters.lamda: not a parameter of stf; did you mean 'lambda'?",
        ),
        (
            "parameters: {gamma: 7}",
            "parameters.gamma: not a parameter of stf; it is called 'lambda' here",
        ),
        ("paramters: {lambda: 7}", "paramters: unknown key; did you mean 'parameters'?"),
        ("parameters: {lambda: .nan}", "parameters.lambda: "),
        ("parameters: {lambda: .inf}", "parameters.lambda: "),
        ("parameters: {weight: -.inf}", "parameters.weight: "),
        ("parameters: {density: 0}", "parameters.density: "),
        ("parameters: {density: 1.1}", "parameters.density: "),
        ("parameters: {density: [0.5, -1]}", "parameters.density[1]: "),
        ("parameters: {density: [{filter: a, value: 2}]}", "parameters.density[0].value: "),
        ("parameters: {rank: 0}", "parameters.rank: "),
        ("parameters: {rank: -3}", "parameters.rank: "),
        ("parameters: {ridge: -1}", "parameters.ridge: "),
        ("parameters: {ridge: often}", "parameters.ridge: "),
        ("parameters: {rule: superpos}", "parameters.rule: "),
        (
            "parameters: {lambda: [{filter: mlp, value: '-1,25'}]}",
            "parameters.lambda[0].value: must be written with a point, -1.25, got",
        ),
        (
            "normalize: true",
            "normalize: not read here; normalize is a parameter and belongs one level",
        ),
        ("lambda: 0.5", "lambda: not read here; lambda is a parameter and belongs one level"),
        ("t: 0.5", "t: not read here; t is a parameter and belongs one level"),
        (
            "parameters: {rule: {filtr: a, value: sum}}",
            "parameters.rule.filtr: unknown key; did you mean 'filter'?",
        ),
        (
            "parameters: {rule: [{filter: a, value: sum}, mean]}",
            "parameters.rule[1]: expected «filter» and «value»",
        ),
        ("parameters: {lambda: []}", "parameters.lambda: an empty list"),
        ("parameters: {lambda: null}", "parameters.lambda: expected a single value; got None"),
        ("parameters: 3", "parameters: expected a mapping of names to values; got 3"),
        (
            "dtype: float8",
            "dtype: expected one of float16, bfloat16, float32, float64; got 'float8'",
        ),
        ("out_dtype: int64", "out_dtype: expected one of"),
        (
            "dtype: float32\ndtype: float16",
            "line 8, dtype: given again on line 9; keep one of them",
        ),
        (
            "modules: {text: {models: [{model: /}]}}",
            "give exactly one of models, slices and modules; got models and modules",
        ),
        ("tokenizer: {sorce: base}", "tokenizer.sorce: unknown key; did you mean 'source'?"),
        (
            "tokenizer: {source: base, tokens: {x: {forc: true}}}",
            "tokenizer.tokens.x.forc: unknown key; did you mean 'force'?",
        ),
        (
            "tokenizer: {source: base}\ntokenizer_source: base",
            "line 9, tokenizer_source: give tokenizer_source or tokenizer, not both",
        ),
        ("chat_template: [1]", "chat_template: Input should be a valid string"),
    ],
)
def test_every_mistake_is_named_and_located(models: Path, extra: str, expected: str) -> None:
    (line,) = problems(recipe(models, extra))
    at = "" if expected.startswith(("line", "give")) else "line 8, "
    assert line.startswith(f"r.yml: {at}{expected}")


@pytest.mark.parametrize(
    ("of_a", "expected"),
    [
        (", wieght: 1", "wieght: not a parameter of stf; did you mean 'weight'?"),
        (", lambda: 1", "lambda: holds for all models at once and is ignored here"),
        (", density: nil", "density: "),
        (
            "}\n    layer_range: [0, 1]\n    paramters: {",
            "line 6, models[0].layer_range: unknown key",
        ),
    ],
)
def test_mistakes_of_one_model(models: Path, of_a: str, expected: str) -> None:
    line = problems(recipe(models, of_a=of_a))[0].removeprefix("r.yml: ")
    at = "" if expected.startswith("line") else "line 5, models[0].parameters."
    assert line.startswith(at + expected)


def test_all_problems_come_together(models: Path) -> None:
    text = recipe(models, "parameters: {lamda: 7, density: 0}\ndtype: half", ", wieght: 1")
    found = problems(text.replace("/b\n", "/nowhere\n"))
    paths = [line.partition(":")[0].split(", ")[1] for line in found]
    assert sorted(paths) == [
        "dtype",
        "models[0].parameters.wieght",
        "models[1].model",
        "parameters.density",
        "parameters.lamda",
    ]


def test_missing_method_and_misspelt_method(models: Path) -> None:
    text = recipe(models, method="stff")
    assert problems(text) == [
        "r.yml: line 1, merge_method: unknown method 'stff'; did you mean 'stf'?"
    ]
    text = text.replace("merge_method: stff", "")
    assert problems(text)[0].startswith("r.yml: merge_method: missing")


@pytest.mark.parametrize("method", ["stf", "ties"])
def test_a_decimal_comma(models: Path, method: str) -> None:
    (block,) = problems(recipe(models, "parameters:\n  density: 0,5", method=method))
    expected = "must be written with a point, 0.5, got '0,5'"
    assert block == f"r.yml: line 9, parameters.density: {expected}"
    flow = problems(recipe(models, "parameters: {density: 0,5}", method=method))[-1]
    assert "line 8, parameters.5: a comma ends an entry; write the number before it with" in flow


def test_a_decimal_comma_in_mergekit_yaml() -> None:
    density = next(p for p in parameters_of(methods.get("stf")) if p.name == "density")
    with pytest.raises(STFError, match=r"parameter `density`: must be written with a point, 0\.5"):
        density.validate("0,5")


@pytest.mark.parametrize(
    ("method", "meant"),
    [
        ("STF", "stf"),
        ("tie", "ties"),
        ("Task-Arithmetic", "task_arithmetic"),
        ("dare-ties", "dare_ties"),
    ],
)
def test_a_method_by_another_spelling(models: Path, method: str, meant: str) -> None:
    (line,) = problems(recipe(models, method=method))
    expected = f"unknown method {method!r}; did you mean {meant!r}?"
    assert line == f"r.yml: line 1, merge_method: {expected}"


def test_a_parameter_beside_the_parameters_of_a_model(models: Path) -> None:
    text = recipe(models).replace("/b\n", "/b\n    weight: 0.3\n")
    (line,) = problems(text)
    assert line.startswith("r.yml: line 7, models[1].weight: not read here; weight is a parameter")


def test_several_recipes_in_a_file(models: Path) -> None:
    (line,) = problems(f"{recipe(models)}\n---\n{recipe(models)}")
    assert line.startswith("r.yml, line 9, column 1: a second recipe starts here; ")
    assert "mergekit-multi" in line
    assert check_recipe(f"---\n{recipe(models)}").warnings == ()


def test_missing_base(models: Path) -> None:
    text = recipe(models).replace("base_model:", "# ")
    assert problems(text) == [
        "r.yml: base_model: missing; stf needs the model that the others were tuned from"
    ]


def test_paths(models: Path) -> None:
    (models / "file").touch()
    for path, expected in [
        (f"{models}/none", f"no directory '{models}/none'"),
        (f"{models}/file", f"'{models}/file' is a file; give the model's directory"),
        ("~/model", "no directory '~/model'; ~ is not expanded here"),
        ("a+b+c", "not a model: 'a+b+c'; write «path», «path+adapter» or «path@revision»"),
        ("'a b/c'", "'a b/c' is neither a directory nor the name of a hub model"),
    ]:
        (line,) = problems(recipe(models).replace(f"{models}/b\n", f"{path}\n"))
        assert line == f"r.yml: line 6, models[1].model: {expected}"
    check_recipe(recipe(models).replace(f"{models}/b\n", "somebody/model@main+other/adapter\n"))


@pytest.mark.parametrize(
    ("name", "means"),
    [("c++", "an adapter follows"), ("a+b", "an adapter follows"), ("a@b", "a revision follows")],
)
def test_a_directory_whose_name_the_host_takes_apart(models: Path, name: str, means: str) -> None:
    (models / name).mkdir()
    text = recipe(models).replace(f"{models / 'a'}", f"{models / name}")
    (line,) = problems(text)
    assert f"«{name[1]}» means that {means}" in line
    assert "rename the directory" in line


def test_a_model_listed_twice(models: Path) -> None:
    text = recipe(models).replace("/b\n", "/a\n")
    assert "models[1]: " in problems(text)[0]
    assert "is listed twice" in problems(text)[0]


BOMB = "k0: &k0 [1]\n" + "".join(
    f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 8)}]\n" for i in range(1, 9)
)
SLICES = """merge_method: stf
base_model: {0}/base
slices:
  - sources:
      - {{model: {0}/base, layer_range: [0, 2]}}
      - {{model: {0}/a, layer_range: {1}, parameters: {{weight: {2}}}}}
    parameters: {{lambda: 0.5}}
"""


def test_slices(models: Path) -> None:
    check_recipe(SLICES.format(models, "[0, 2]", 1))
    where = "slices[0].sources[1].layer_range: expected [first, end) as two whole numbers"
    for wrong in ("[2, 0]", "[0]", "3", "[0, 1.5]", "[-1, 1]"):
        assert where in problems(SLICES.format(models, wrong, 1))[0]
    assert "as many layers; got 2 and 3" in problems(SLICES.format(models, "[0, 3]", 1))[0]
    line = problems(SLICES.format(models, "[0, 2]", "x"))[0]
    assert "slices[0].sources[1].parameters.weight: " in line


def test_slices_without_the_base(models: Path) -> None:
    text = SLICES.format(models, "[0, 2]", 1)
    text = text.replace(f"      - {{model: {models}/base, layer_range: [0, 2]}}\n", "")
    (line,) = problems(text)
    assert f"slices[0].sources: the base model {models}/base is missing: " in line
    assert line.endswith("; list it too")


def test_modules(models: Path) -> None:
    text = f"""merge_method: stf
base_model: {models}/base
modules:
  text:
    models:
      - model: {models}/a
        parameters: {{weight: 1, densty: 1}}
    parameters: {{lambda: 2, lambada: 1}}
    modles: 3
"""
    assert [line.partition(":")[0] for line in problems(text)] == [
        "line 9, modules.text.modles",
        "line 8, modules.text.parameters.lambada",
        "line 7, modules.text.models[0].parameters.densty",
    ]


def test_what_a_ties_recipe_carries_is_said_aloud(models: Path) -> None:
    extra = "parameters: {normalize: true, rescale: false, int8_mask: true}"
    assert check_recipe(recipe(models, extra, method="ties")).warnings == ()
    warnings = check_recipe(recipe(models, extra)).warnings
    assert [line.partition(": ")[0] for line in warnings] == [
        "line 8, parameters.normalize",
        "line 8, parameters.rescale",
        "line 8, parameters.int8_mask",
    ]


def test_settings_without_effect_are_said_aloud(models: Path) -> None:
    text = recipe(models, "parameters: {rule: [{value: sum}, {filter: a, value: mean}]}")
    text = text.replace(
        "models:", f"models:\n  - {{model: {models}/base, parameters: {{weight: 2}}}}"
    )
    first, second = check_recipe(text).warnings
    assert "parameters.rule[1]: never used" in first
    assert "models[0].parameters.weight: ignored: this is the base model" in second


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "merge_method: [",
        "a: &a [*a]",
        "a: !!python/object:os.system {}",
        "a: 2001-99-99",
        "\x00",
        "[" * 5000,
        BOMB,
        "1: 2\nnull: 3\n? [a, b]\n: 4",
        "merge_method: {a: b}\nmodels: {a: b}\nmodules: [3]\nslices: 3",
        "x" * 1_000_001,
    ],
    ids=range(12),
)
def test_hostile_text_ends_in_one_error(text: str) -> None:
    assert all(line.isprintable() for line in problems(text))


NUMBERS = [
    f"0x{'f' * 300}", f"-0x{'f' * 900_000}", "9" * 4000, f"0b{'1' * 5000}", ":".join(["59"] * 5000),
    ":".join(["59"] * 300) + ".5", "1_" * 300 + "0", f"!!int {'7' * 310}", f"!!float {'7' * 500}",
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:8])
@pytest.mark.parametrize("place", ["parameters: {{lambda: {}}}", "dtype: {}", "chat_template: {}"])
def test_numbers_beyond_float64_are_refused(models: Path, number: str, place: str) -> None:
    (line,) = problems(recipe(models, place.format(number)))
    assert "a number beyond what float64 can hold" in line


@pytest.mark.parametrize("number", ["1e400", ".inf", "-.inf", ".nan"])
def test_what_is_no_number_of_float32_is_refused(models: Path, number: str) -> None:
    (line,) = problems(recipe(models, f"parameters: {{lambda: {number}}}"))
    assert "must be a finite number" in line


def test_a_timestamp_out_of_range(models: Path) -> None:
    date = "0001-01-01 00:00:00+23:59"
    assert problems(recipe(models, f"parameters: {{lambda: {date}}}"))


MANY = "a," * 2_000 + "a"
BOMBS = {
    "key": f"? {'k' * 400_000}\n: [{MANY}]\n",
    "keys": "{" + f"? {'k' * 9000} : {{" * 50 + f"x: [{MANY}]" + "}" * 51,
    "modules": f"modules: {{ ? {'m' * 400_000} : [{MANY}]}}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_is_bounded_by_the_text(bomb: str) -> None:
    text = BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(STFError, match="many values stand under long keys"):
            check_recipe(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1000 * len(text)


def test_load_recipe(models: Path) -> None:
    path = models / "r.yml"
    with pytest.raises(STFError, match=r"r\.yml: cannot be read: No such file"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(STFError, match="not UTF-8 text"):
        load_recipe(path)
    path.write_text(recipe(models))
    assert load_recipe(path).source == str(path)
