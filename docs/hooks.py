"""What the site has besides ``docs/``: the pages of the repository's root, and the recipes.

The pages are plain files that link to each other as they lie in the repository; here their links
are turned to where the pages lie on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, the gallery of recipes, and the recipes themselves."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "recipes.md", content=gallery()))
    for path in sorted((ROOT / "example_configs").rglob("*.yml")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def gallery() -> str:
    """Return a page of all example recipes, each under the sentence that says when to use it."""
    parts = ["# Recipes", "", "Each shows one idea, and its first line says when to use it.", ""]
    for path in sorted((ROOT / "example_configs").glob("*.yml")):
        recipe = path.read_text("utf-8")
        parts += [f"## {path.stem}", "", "```yaml", recipe.rstrip(), "```", ""]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page to the site; what is not on the site is no link there."""

    def turned(found: re.Match[str]) -> str:
        text, link = found.groups()
        if re.match(r"\w+:|#", link):
            return found[0]
        path, sign, anchor = link.partition("#")
        target = place_of(path, page.file.src_uri)
        if files.get_file_from_path(target) is None:
            return text
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"[{text}]({posixpath.relpath(target, here)}{sign}{anchor})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", turned, markdown)


def place_of(link: str, page: str) -> str:
    """Return the place on the site of what a page links to in the repository.

    Args:
        link: relative, as the page has it.
        page: its place on the site.
    """
    names = {place: name for name, place in PAGES.items()}
    folder = posixpath.dirname(names.get(page, f"docs/{page}"))
    path = posixpath.normpath(posixpath.join(folder, link))
    if path == "example_configs":
        return "recipes.md"
    return PAGES.get(path, path.removeprefix("docs/"))
