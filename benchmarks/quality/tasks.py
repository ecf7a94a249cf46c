"""The tasks: prompt and answer for the decoder, text and class for the encoder.

Every item is in one split only. Items of a task are drawn with its name as the seed, so that they
are the same on every machine with the same versions of the packages.
"""

from __future__ import annotations

import importlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.quality import sources

Pairs = Iterable[tuple[str, str]]

VALIDATION, TEST, TRAIN = 200, 400, 3000
SPLITS = ("train", "validation", "test")
"""Examples of each split, at most."""


@dataclass(frozen=True)
class Task:
    """A task with its examples by split, each a prompt or text and its answer or class.

    Attributes:
        kind: classification, translation, arithmetic, list, extraction, code or inflection.
    """

    name: str
    kind: str
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    test: list[tuple[str, str]]


def split(name: str, kind: str, pairs: Pairs) -> Task:
    """Shuffle and split; what is asked twice is kept once."""
    items = sorted(dict(pairs).items())
    random.Random(name).shuffle(items)
    end = VALIDATION + TEST
    if len(items) < 2 * end:
        raise SystemExit(f"the task {name} has only {len(items)} examples")
    held = items[:VALIDATION], items[VALIDATION:end]
    return Task(name, kind, items[end : end + TRAIN], *held)


def balanced(pairs: Pairs, most: int) -> Pairs:
    """Keep at most so many of each class, drawn at random."""
    by_class = defaultdict(list)
    for text, label in sorted(pairs):
        by_class[label].append(text)
    for label, texts in sorted(by_class.items()):
        random.Random(label).shuffle(texts)
        yield from ((text, label) for text in texts[:most])


def _asked(form: str, pairs: Pairs) -> Pairs:
    return ((form.format(text), answer) for text, answer in pairs)


def _sentiment() -> Pairs:
    return _asked("Sentiment of the word {}:", balanced(sources.sentiments(), 2000))


def _origin() -> Pairs:
    return _asked("Origin of the surname {}:", balanced(sources.surnames(), 400))


def _spelled(language: str, name: str) -> Pairs:
    spell = importlib.import_module("num2words").num2words
    for number in random.Random(name).sample(range(10_000), 4000):
        yield f"{number} in {name}:", spell(number, lang=language)


def _arithmetic() -> Pairs:
    for a in range(10, 100):
        for b in range(10, 100, 3):
            yield f"{a} + {b} =", str(a + b)
            if a > b:
                yield f"{a} - {b} =", str(a - b)


def _sorting() -> Pairs:
    draw = random.Random("sorting")
    for _ in range(4000):
        digits = [str(draw.randrange(10)) for _ in range(5)]
        yield f"Sort: {' '.join(digits)}\nSorted:", " ".join(sorted(digits))


def _extraction() -> Pairs:
    faker = importlib.import_module("faker").Faker("en_US")
    faker.seed_instance(0)
    forms = (
        "{name} of {company} moved to {city} in {year}.",
        "In {year} the office of {company} in {city} hired {name}.",
        "{company} wrote to {name} in {city} about the contract of {year}.",
        "From {city}, {name} has worked for {company} since {year}.",
    )
    draw = random.Random("extraction")
    for _ in range(4000):
        facts = {"name": faker.name(), "company": faker.company(), "city": faker.city()}
        facts["year"] = faker.year()
        asked = draw.choice(("company", "city", "year"))
        yield f"{draw.choice(forms).format(**facts)}\nThe {asked}:", facts[asked]


def _keyword() -> Pairs:
    return _asked("Python: {}\nKeyword:", balanced(sources.keyword_lines(), 300))


def _inflection() -> Pairs:
    forms = {
        "VBD": "Past tense",
        "VBG": "Present participle",
        "NNS": "Plural",
        "JJR": "Comparative",
    }
    pairs = ((f"{forms[tag]} of {lemma}:", form) for lemma, tag, form in sources.inflections())
    return random.Random("inflection").sample(sorted(pairs), 4000)


DECODER: dict[str, tuple[str, Callable[[], Pairs]]] = {
    "extraction": ("extraction", _extraction),
    "sentiment": ("classification", _sentiment),
    "keyword": ("code", _keyword),
    "sorting": ("list", _sorting),
    "origin": ("classification", _origin),
    "inflection": ("inflection", _inflection),
    "arithmetic": ("arithmetic", _arithmetic),
    "french": ("translation", lambda: _spelled("fr", "French")),
    "spanish": ("translation", lambda: _spelled("es", "Spanish")),
}
"""The last two are of one domain."""


def _language() -> Pairs:
    seen = defaultdict(set)
    for language in ("de", "es", "fr", "it", "pt", "tr"):
        for phrase in sources.phrases(language).values():
            seen[phrase].add(language)
    return balanced(((text, *found) for text, found in seen.items() if len(found) == 1), 700)


def _syllables() -> Pairs:
    words = sources.pronunciations().items()
    counts = ((word, str(min(4, max(1, sum(map(str.isdigit, sounds)))))) for word, sounds in words)
    return balanced(counts, 900)


def _form() -> Pairs:
    pairs = {form: tag for _, tag, form in sources.inflections()}
    return balanced(pairs.items(), 900)


def _module() -> Pairs:
    chosen = ("argparse", "ast", "datetime", "doctest", "inspect", "mailbox", "tarfile", "typing")
    for name in chosen:
        for line in sources.modules()[name].splitlines():
            if 25 < len(line.strip()) < 90:
                yield line.strip(), name


ENCODER: dict[str, tuple[str, Callable[[], Pairs]]] = {
    "sentiment": ("classification", lambda: balanced(sources.sentiments(), 2000)),
    "origin": ("classification", lambda: balanced(sources.surnames(), 400)),
    "language": ("classification", _language),
    "keyword": ("classification", lambda: balanced(sources.keyword_lines(), 300)),
    "form": ("classification", _form),
    "syllables": ("classification", _syllables),
    "continent": ("classification", lambda: balanced(sources.cities(), 900)),
    "module": ("classification", lambda: balanced(_module(), 500)),
}


def made(table: dict[str, tuple[str, Callable[[], Pairs]]]) -> list[Task]:
    """Make the tasks of a table."""
    return [split(name, kind, pairs()) for name, (kind, pairs) in table.items()]
