"""Labelled texts: a multilingual task from Unicode CLDR that needs no download, and readers for csv, tsv and jsonl.

In the embedded task a text is the name of a thing in some language, and its label is the kind of thing. The names come
from the CLDR data in the package Babel. Training, validation and test use different *languages*, so accuracy is
measured in languages that were not trained on. Settings are chosen on the validation languages, never on the test
languages.
"""

import csv
import json
import random
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

# The 57 languages that have names of all six kinds, in scripts of Europe and of the Near East, South and East Asia.
_CODES = """
    ar az bg bn bs ca cs da de el en es et eu fa fi fr ga gd gu he hi hr hu id is it ja ka kk ko lt mk ml mr ms nb ne nl
    nn pl pt ro ru sl so sq sr sv ta te th tr uk vi zh zu
"""
LANGUAGES = tuple(_CODES.split())
# All in Latin script, because the fallback for mBERT has an English vocabulary. Each part mixes language families.
TRAIN_LANGUAGES = ("en", "de", "fr", "es", "pl", "fi", "tr", "id")
VALIDATION_LANGUAGES = ("pt", "sv", "sl", "ms")
TEST_LANGUAGES = ("it", "nl", "da", "nb", "cs", "ro", "et", "ca")
TEST_FRACTION = 0.2


class DataError(ValueError):
    """Data that cannot be used. For files, the message names the file and line; it says what was expected and found."""


@dataclass(frozen=True)
class Example:
    text: str
    label: str
    language: str = ""  # empty for files


@dataclass(frozen=True)
class Dataset:
    """Examples in three parts; `validation` is empty for files. `labels` are those of the training part, sorted."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({example.label for example in self.train}))


def load_cldr(
    train: Sequence[str] = TRAIN_LANGUAGES,
    validation: Sequence[str] = VALIDATION_LANGUAGES,
    test: Sequence[str] = TEST_LANGUAGES,
    *,
    per_label: int = 100,
    held_out_per_label: int = 50,
    seed: int = 0,
) -> Dataset:
    """Names of countries, currencies, languages, scripts, time zones and units, deterministic for a given seed.

    At most `per_label` names of each kind are drawn from each training language, and at most `held_out_per_label` from
    each other language. Without these limits, always guessing "language" would be right for two names in five, because
    CLDR has four times as many languages as scripts.

    Each spelling, ignoring case and accents as uncased models do, is used only for the first language that has it. So
    no test name has the spelling of any name in a training language. Names with two kinds in any of these languages or
    in English ("Thai", a language and a script) have no unique label and are omitted.

    Raises DataError for an unknown language, or one given twice.
    """
    chosen = [*train, *validation, *test]
    for language in chosen:
        if language not in LANGUAGES:
            raise DataError(f"languages: expected any of {' '.join(LANGUAGES)}; got {language!r}")
        if chosen.count(language) > 1:
            raise DataError(
                f"languages: expected each language once, in one part; got {language!r} {chosen.count(language)} times"
            )
    names = {language: _names(language) for language in dict.fromkeys(["en", *chosen])}
    labels_of: dict[str, set[str]] = {}
    for by_label in names.values():
        for label, texts in by_label.items():
            for text in texts:
                labels_of.setdefault(_spelling(text), set()).add(label)

    seen: set[str] = set()

    def draw(language: str, most: int) -> Iterator[Example]:
        fresh = {
            _spelling(text): Example(text, label, language)
            for label, texts in names[language].items()
            for text in texts
        }
        for label in names[language]:
            pool = [e for key, e in fresh.items() if e.label == label and key not in seen and len(labels_of[key]) == 1]
            random.Random(f"{seed} {language} {label}").shuffle(pool)
            yield from pool[:most]
        seen.update(fresh)

    parts = [
        (train, per_label),
        (validation, held_out_per_label),
        (test, held_out_per_label),
    ]  # the order matters: a spelling is used for the first language that has it
    drawn = [tuple(example for language in part for example in draw(language, most)) for part, most in parts]
    return Dataset("Unicode CLDR names", *drawn)


def load_files(
    data: str | Path, test_data: str | Path | None = None, *, text: str = "text", label: str = "label", seed: int = 0
) -> Dataset:
    """Training examples from `data` and test examples from `test_data`.

    Without `test_data`, a fifth of the examples of each label in `data` are test examples. Test examples whose text is
    also a training text are dropped. `text` and `label` are the names of the columns; `seed` determines the split.

    Raises DataError as `read_examples` does, for a test label that does not occur in training, for fewer than two
    labels, and if no test example is left.
    """
    train = read_examples(data, text=text, label=label)
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise DataError(f"{data}: expected at least two labels to tell apart, got only {labels[0]!r}")
    if test_data is None:
        name = Path(data).name
        train, test = _split(train, seed)
    else:
        name = f"{Path(data).name}, {Path(test_data).name}"
        test = read_examples(test_data, text=text, label=label, labels=labels)
    trained = {example.text for example in train}
    unseen = tuple(example for example in test if example.text not in trained)
    if not unseen:
        raise DataError(f"{test_data or data}: expected test examples whose text is not trained on, got none")
    return Dataset(name, tuple(train), (), unseen)


def with_validation(dataset: Dataset, seed: int) -> Dataset:
    """The dataset with a validation part: a fifth of the training examples of each label, if it has none yet.

    Examples of the same text stay together. Raises DataError if there are too few examples for that.
    """
    if dataset.validation:
        return dataset
    first = {example.text: example for example in reversed(dataset.train)}
    _, held_out = _split(list(first.values()), seed)
    texts = {example.text for example in held_out}
    if not texts:
        raise DataError(f"{dataset.name}: expected at least {1 / TEST_FRACTION:.0f} training texts of some label")
    train = tuple(example for example in dataset.train if example.text not in texts)
    return replace(dataset, train=train, validation=tuple(held_out))


def _split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Returns (train, test), both in the order of the file.

    All examples of a label with fewer than 1 / TEST_FRACTION examples are in `train`.
    """
    shuffled = list(enumerate(examples))
    random.Random(seed).shuffle(shuffled)
    by_label: dict[str, list[int]] = {}
    for index, example in shuffled:
        by_label.setdefault(example.label, []).append(index)
    held_out = {i for indices in by_label.values() for i in indices[: int(TEST_FRACTION * len(indices))]}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(examples):
        parts[index in held_out].append(example)
    return parts


def read_examples(
    path: str | Path, *, text: str = "text", label: str = "label", labels: Collection[str] | None = None
) -> list[Example]:
    """Examples from the columns (or keys) `text` and `label` of a UTF-8 file. Its ending is .csv, .tsv or .jsonl.

    csv and tsv files begin with a line of column names. csv is quoted according to RFC 4180, tsv is not quoted. jsonl
    has one JSON object in each line, and its label may be an integer. Blank lines are skipped. Raises DataError, with
    file and line, for anything else, and for a label that is not in `labels` if these are given.
    """
    examples = []
    for line, found in _read(Path(path), (text, label)):
        if labels is not None and found[label] not in labels:
            known = ", ".join(labels)
            raise DataError(f"{path}, line {line}: expected a label of training ({known}), got {found[label]!r}")
        examples.append(Example(found[text], found[label]))
    return examples


def read_texts(path: str | Path, *, text: str = "text") -> list[str]:
    """Texts from the column (or key) `text` of a file as in `read_examples`, which may have no labels. Raises as it."""
    return [found[text] for _, found in _read(Path(path), (text,))]


def _read(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text without white space around it}) of each row of a file. Raises as `read_examples`."""
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise DataError(f"{path}: expected a file name ending in {', '.join(_READERS)}, got {ending or 'no ending'!r}")
    count = 0
    try:
        # utf-8-sig skips the byte order mark that spreadsheets write. newline="" because quoted csv fields may contain
        # line breaks.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in _READERS[ending](path, file, columns):
                for column in columns:
                    if not isinstance(row[column], str) or not row[column].strip():
                        raise DataError(f"{path}, line {line}: expected text in {column!r}, got {row[column]!r}")
                yield line, {column: row[column].strip() for column in columns}
                count += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, got: {error.strerror}") from None
    if not count:
        raise DataError(f"{path}: expected at least one example, got none")


_Rows = Iterator[tuple[int, dict[str, Any]]]  # line number, column -> value


def _read_table(path: Path, file: TextIO, columns: Sequence[str], **dialect: Any) -> _Rows:
    reader = csv.reader(file, **dialect)
    try:
        header = next(reader, [])
        for column in columns:
            if column not in header:
                raise DataError(f"{path}, line 1: expected a column {column!r}, got {', '.join(header) or 'nothing'}")
        for row in filter(None, reader):
            if len(row) != len(header):
                raise DataError(f"{path}, line {reader.line_num}: expected {len(header)} columns, got {len(row)}")
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: expected a row of a table, got: {error}") from None


def _read_jsonl(path: Path, file: TextIO, columns: Sequence[str]) -> _Rows:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]!r} ({error.msg})"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]!r}")
        for column in columns:
            if column not in row:
                raise DataError(f"{path}, line {number}: expected a key {column!r}, got {', '.join(row) or 'nothing'}")
        yield number, row | {column: str(row[column]) for column in columns[1:] if type(row[column]) is int}


_READERS: dict[str, Callable[[Path, TextIO, Sequence[str]], _Rows]] = {
    ".csv": partial(_read_table, strict=True),
    ".tsv": partial(_read_table, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".jsonl": _read_jsonl,
}


def _names(language: str) -> dict[str, list[str]]:
    """{label: names in this language}, without names that reveal the label and entries that are not names."""
    from babel import Locale
    from babel.units import get_unit_name

    locale = Locale.parse(language)
    zones = {zone: names.get("long", {}) for zone, names in locale.meta_zones.items()}
    by_label = {
        # Two letters are countries, numbers are regions of the world. XA, XB, ZZ and scripts in Z are not real ones.
        "country": {c: n for c, n in locale.territories.items() if len(c) == 2 and c not in ("XA", "XB", "ZZ")},
        # XTS is a code for tests, XXX means no currency.
        "currency": {c: n for c, n in locale.currencies.items() if c not in ("XTS", "XXX")},
        # Codes such as "en_GB" name a country too; mul, und and zxx are not languages.
        "language": {c: n for c, n in locale.languages.items() if "_" not in c and c not in ("mul", "und", "zxx")},
        "script": {c: n for c, n in locale.scripts.items() if not c.startswith("Z")},
        "time zone": {zone: names.get("standard") or names.get("generic") for zone, names in zones.items()},
        "unit": {unit: get_unit_name(unit, "long", locale) for unit in map(str, locale.unit_display_names)},
    }
    # Babel gives the code for a missing name. Brackets contain years (of currencies) and variants and reveal the label.
    return {
        label: [n for c, n in sorted(items.items()) if n and n.casefold() != c.casefold() and not set(n) & set("(（")]
        for label, items in by_label.items()
    }


def _spelling(text: str) -> str:
    """The text without case and accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
