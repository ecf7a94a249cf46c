"""What the README, the constraints and CI say of each other and of the code."""

from __future__ import annotations

import re
from importlib import metadata

from mergekit import merge_methods
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mergekit_stf.cli.main import COMMANDS
from mergekit_stf.host.plugin.parameters import IGNORED
from tests.environments import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_has_two_commands_and_ci_runs_the_second() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert '".[report]" && mergekit-stf demo' in blocks[0]  # for what the demo tells to try next
    install, test = blocks[1].splitlines()[1].split(" && ")
    assert install.startswith("pip install -c constraints.txt ")
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
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


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("https://")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    wanted = map(Requirement, metadata.requires("mergekit-stf") or [])
    assert {canonicalize_name(requirement.name) for requirement in wanted} <= pinned
