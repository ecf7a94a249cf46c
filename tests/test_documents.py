"""What the README, the constraints and CI say of each other and of the code."""

from __future__ import annotations

import json
import re
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from mergekit import merge_methods
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mergekit_stf import __version__
from mergekit_stf.cli.main import COMMANDS
from mergekit_stf.core import LowRank, Method, TaskMatrices
from mergekit_stf.core.methods.method import MERGE
from mergekit_stf.host.plugin.parameters import IGNORED
from tests.environments import PACKAGE, ROOT

README = (ROOT / "README.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def test_the_readme_has_two_commands_and_ci_runs_the_second() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert '".[report]" && mergekit-stf demo' in blocks[0]  # for what the demo tells to try next
    install, test = blocks[1].splitlines()[1].split(" && ")
    assert install.startswith("pip install -c constraints.txt ")
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()]
    assert install in lines
    assert lines[-1].startswith(test)


def test_the_readme_lists_the_parameters_of_the_method() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (each model|the merge) \| (\S+) \|", README, re.MULTILINE)
    listed = {name: default.strip("`") for name, _, default in rows}
    spec = merge_methods.get("stf").spec
    assert listed == {p.name: str(p.default) for p in spec.parameters if p.name not in IGNORED}


def test_the_readme_lists_the_commands() -> None:
    table = README.split("## Around the merge")[1].split("## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(COMMANDS)


def local_links(page: Path) -> list[tuple[Path, str]]:
    """Return file and anchor of every link of a page that is no address."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    parts = [link.partition("#") for link in links if not link.startswith("https://")]
    return [(page.parent / file if file else page, anchor) for file, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_a_page_leads_somewhere() -> None:
    links = [(page.name, *link) for page in PAGES for link in local_links(page)]
    assert len(links) > 50
    assert [link for link in links if not link[1].exists()] == []
    assert [link for link in links if link[2] and link[2] not in anchors(link[1])] == []


def toy(name: str = "LeadingSum") -> Method:
    """Return a method that the page on the architecture tells a newcomer to write."""
    blocks = re.findall(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL)
    first, *others = (block for block in blocks if "(Method):" in block)
    assert len(first.splitlines()) <= 30
    module = types.ModuleType("toys")
    imports = "import torch\nfrom mergekit_stf.core.methods.method import ALL_RULES\n"
    for code in (first, imports, *others):
        exec(compile(code, "docs/architecture.md", "exec"), module.__dict__)
    method: Method = getattr(module, name)()
    return method


def leading_sum(matrices: list[np.ndarray], kept: int) -> np.ndarray:
    U, s, Vh = np.linalg.svd(np.stack(matrices), full_matrices=False)
    return sum((U[..., :kept] * s[:, None, :kept]) @ Vh[:, :kept])


def test_the_method_of_the_page_on_the_architecture_merges() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(9, 4, generator=generator), torch.randn(4, 6, generator=generator))
        for _ in range(3)
    ]
    expected = leading_sum([(A @ B).double().numpy() for A, B in pairs], 3)
    whole = toy().merge(TaskMatrices.of([A @ B for A, B in pairs]), {"rank": 0.5})
    factored = toy().merge(TaskMatrices.of([LowRank(A, B) for A, B in pairs]), {"rank": 0.5})
    assert isinstance(factored.M, LowRank)
    np.testing.assert_allclose(whole.M.double().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(factored.M.dense().numpy(), expected, atol=1e-5)
    assert whole.record.kept == factored.record.kept == (3, 3, 3)


def test_the_second_method_of_that_page_takes_the_median_of_every_kind() -> None:
    matrices = [*torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))]
    median = toy("Median")
    expected = np.median([M.numpy() for M in matrices], axis=0)
    found = median.merge(TaskMatrices.of(matrices), {}).M
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert median.elementwise
    assert set(median.rules.values()) == {MERGE}


def test_every_path_of_the_page_on_the_architecture_exists() -> None:
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", ARCHITECTURE))
    roots = (
        ROOT,
        PACKAGE.parent,
        PACKAGE,
        PACKAGE / "host",
        PACKAGE / "core",
    )
    made = {"mergekit_stf/core/methods/leading_sum.py", "cli/NAME.py"}
    assert len(named) > 20
    assert {n for n in named - made if not any((root / n).exists() for root in roots)} == set()


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    wanted = map(Requirement, metadata.requires("mergekit-stf") or [])
    assert {canonicalize_name(requirement.name) for requirement in wanted} <= pinned


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == __version__  # type: ignore[index]


QUALITY = {"encoder_h200.json": "accuracy", "decoder_small.json": "kept"}
LABELS = {
    "TIES, density 0.2": "ties, density 0.2",
    "mergekit's ties, density 0.2": "ties, density 0.2",
    "task arithmetic": "task_arithmetic",
    "mergekit's task_arithmetic": "task_arithmetic",
    "average": "linear",
}


def measured_qualities(method: str) -> list[str]:
    """Return what was measured, at the default and, if a scale was chosen, at the best one."""
    found = []
    for file, value in QUALITY.items():
        text = (ROOT / "benchmarks" / "results" / "quality" / file).read_text("utf-8")
        merges = json.loads(text)["runs"][0]["cases"]["all"]["methods"]
        if entry := merges.get(method):
            for when in ("default", "best") if entry["grid"] else ("default",):
                each = entry[when][value]
                number = np.mean(list(each.values())) if isinstance(each, dict) else each
                found.append(f"{100 * number:.1f}")
    return found


@pytest.mark.parametrize(
    ("page", "columns", "count"), [("README.md", 4, 8), ("docs/methods.md", 2, 13)]
)
def test_the_qualities_shown_are_those_measured(page: str, columns: int, count: int) -> None:
    checked = 0
    for line in (ROOT / page).read_text("utf-8").splitlines():
        title, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        name = title.replace("`", "").replace("*", "")
        shown = re.findall(r"\b\d+\.\d\b", " ".join(cells[:columns]))
        if shown and (wanted := measured_qualities(LABELS.get(name, name))):
            assert shown == wanted, name
            checked += 1
    assert checked == count
