"""The embedded data: deterministic, no leakage, split by language. The readers: what they read, and every error."""

import re
from collections import Counter

import pytest
from babel import Locale

from hsaid_kernels.app.data import (
    LANGUAGES,
    TEST_LANGUAGES,
    TRAIN_LANGUAGES,
    VALIDATION_LANGUAGES,
    DataError,
    Example,
    _names,
    _spelling,
    load_cldr,
    load_files,
    read_examples,
    with_validation,
)


@pytest.fixture(scope="module")
def cldr():
    return load_cldr()


def test_parts_are_different_languages(cldr):
    for part, languages in [
        (cldr.train, TRAIN_LANGUAGES),
        (cldr.validation, VALIDATION_LANGUAGES),
        (cldr.test, TEST_LANGUAGES),
    ]:
        assert {example.language for example in part} == set(languages)
    assert len({*TRAIN_LANGUAGES, *VALIDATION_LANGUAGES, *TEST_LANGUAGES}) == 20
    assert len(LANGUAGES) == len(set(LANGUAGES)) >= 50


def test_is_balanced(cldr):
    """No label is so frequent that guessing it would look like learning."""
    assert cldr.labels == ("country", "currency", "language", "script", "time zone", "unit")
    for part in (cldr.train, cldr.validation, cldr.test):
        count = Counter(example.label for example in part)
        assert max(count.values()) / len(part) < 0.2
        assert min(count.values()) / len(part) > 0.1
    assert max(Counter((e.language, e.label) for e in cldr.train).values()) == 100
    assert max(Counter((e.language, e.label) for e in cldr.test).values()) == 50


def test_no_test_name_is_spelled_as_any_name_in_a_training_language(cldr):
    """Not only as those that were drawn for training; case and accents do not count."""
    trained = {_spelling(n) for lang in TRAIN_LANGUAGES for names in _names(lang).values() for n in names}
    trained |= {_spelling(example.text) for example in cldr.validation}
    assert not trained & {_spelling(example.text) for example in cldr.test}
    everywhere = [_spelling(e.text) for e in (*cldr.train, *cldr.validation, *cldr.test)]
    assert len(everywhere) == len(set(everywhere))


def test_no_name_stands_for_two_kinds_or_gives_its_kind_away(cldr):
    english = _names("en")
    kinds = {_spelling(name): label for label, names in english.items() for name in names}
    for example in (*cldr.train, *cldr.validation, *cldr.test):
        assert kinds.get(_spelling(example.text), example.label) == example.label
        assert "(" not in example.text
        assert example.text not in Locale("en").currencies  # not its own code


def test_depends_on_the_seed_alone(cldr):
    assert load_cldr(seed=0) == cldr
    other = load_cldr(seed=1)
    assert other != cldr
    assert Counter(e.label for e in other.train) == Counter(e.label for e in cldr.train)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_kind(language):
    names = _names(language)
    assert all(len(names[label]) >= 15 for label in ("country", "currency", "language", "script", "time zone", "unit"))


def test_languages_can_be_chosen():
    dataset = load_cldr(["ru", "ar"], [], ["zh"], held_out_per_label=7)
    assert {e.language for e in dataset.train} == {"ru", "ar"}
    assert dataset.validation == ()
    assert len(dataset.test) == 6 * 7
    assert any("\u4e00" <= character <= "\u9fff" for e in dataset.test for character in e.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["en", "tlh"], [], ["de"]), r"expected any of ar az .*; got 'tlh'"),
        ((["en"], [], ["en"]), r"once.*'en' 2 times"),
    ],
)
def test_languages_that_cannot_be_chosen(arguments, message):
    with pytest.raises(DataError, match=message):
        load_cldr(*arguments)


READABLE = {
    "plain.csv": "text,label\na,x\nb,y\n",
    "mark.csv": "\ufefftext,label\r\na,x\r\n\r\nb,y\r\n",  # a byte order mark, CR LF, a blank line
    "quoted.csv": 'id,label,text\n1," x","a"\n2,"y",b\n',
    "plain.TSV": "label\ttext\nx\ta\ny\tb\n",
    "plain.jsonl": '{"text": "a", "label": "x"}\n\n{"label": "y", "text": "b", "more": 3}\n',
}


@pytest.mark.parametrize("name", READABLE)
def test_reads(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(READABLE[name].encode())
    assert read_examples(path) == [Example("a", "x"), Example("b", "y")]


def test_reads_what_only_one_format_can_say(tmp_path):
    (tmp_path / "lines.csv").write_text('text,label\n"a ""q"",\nb",x\n')
    assert read_examples(tmp_path / "lines.csv") == [Example('a "q",\nb', "x")]
    (tmp_path / "quote.tsv").write_text('text\tlabel\n5" disk\tx\n')
    assert read_examples(tmp_path / "quote.tsv") == [Example('5" disk', "x")]
    (tmp_path / "number.jsonl").write_text('{"sentence": "ä", "class": 0}\n')
    assert read_examples(tmp_path / "number.jsonl", text="sentence", label="class") == [Example("ä", "0")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv, line 1: expected a column 'text', got nothing"),
        ("a.csv", "text,class\na,x\n", "a.csv, line 1: expected a column 'label', got text, class"),
        ("a.csv", "text,label\n", "a.csv: expected at least one example, got none"),
        ("a.csv", "text,label\na,x\nb,\n", "a.csv, line 3: expected text in 'label', got ''"),
        ("a.csv", "text,label\n  ,x\n", "a.csv, line 2: expected text in 'text', got '  '"),
        ("a.csv", "text,label\na,b,x\n", "a.csv, line 2: expected 2 columns, got 3"),
        ("a.csv", "text,label\na\n", "a.csv, line 2: expected 2 columns, got 1"),
        ("a.csv", 'text,label\n"a,x\n', "a.csv, line 2: expected a row of a table, got: unexpected end of data"),
        ("a.tsv", "text,label\na,x\n", "a.tsv, line 1: expected a column 'text', got text,label"),
        ("a.jsonl", "", "a.jsonl: expected at least one example, got none"),
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n{"text": ',
            "a.jsonl, line 2: expected a JSON object, got '{\"text\":'",
        ),
        ("a.jsonl", '["a", "x"]\n', 'a.jsonl, line 1: expected a JSON object, got \'["a", "x"]\''),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl, line 1: expected a key 'label', got text"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl, line 1: expected text in 'label', got None"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "a.jsonl, line 1: expected text in 'text', got 3"),
        ("a.txt", "a x\n", "a.txt: expected a file name ending in .csv, .tsv, .jsonl, got '.txt'"),
        ("a", "a x\n", "a: expected a file name ending in .csv, .tsv, .jsonl, got 'no ending'"),
        ("a.csv", b"text,label\n\xe9,x\n", "a.csv: expected text in UTF-8, got byte 0xe9"),
        ("a.csv", None, "a.csv: expected a file that can be read, got: No such file or directory"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        read_examples(path)


def _write(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def test_two_files(tmp_path):
    train = _write(tmp_path / "train.csv", [("a", "x"), ("b", "y"), ("c", "x")])
    test = _write(tmp_path / "test.csv", [("d", "x"), ("a", "x"), ("e", "y")])
    dataset = load_files(train, test)
    assert dataset.name == "train.csv, test.csv"
    assert dataset.labels == ("x", "y")
    assert [e.text for e in dataset.train] == ["a", "b", "c"]
    assert [e.text for e in dataset.test] == ["d", "e"]  # "a" is trained on


def test_one_file_is_split_label_by_label_by_the_seed(tmp_path):
    path = _write(tmp_path / "all.csv", [(f"text {i}", "xyz"[min(i % 7, 2)]) for i in range(70)] + [("rare", "w")])
    dataset = load_files(path, seed=3)
    assert Counter(e.label for e in dataset.test) == {"x": 2, "y": 2, "z": 10}
    assert len(dataset.train) + len(dataset.test) == 71
    assert not {e.text for e in dataset.train} & {e.text for e in dataset.test}
    assert load_files(path, seed=3) == dataset
    assert load_files(path, seed=4) != dataset


def test_a_fifth_of_the_training_texts_for_validation(tmp_path):
    rows = [(f"text {i % 60}", "xy"[i % 2]) for i in range(70)]  # ten texts twice
    path, test = _write(tmp_path / "train.csv", rows), _write(tmp_path / "test.csv", [("other", "x"), ("more", "y")])
    dataset = load_files(path, test)
    divided = with_validation(dataset, 1)
    assert Counter(e.label for e in divided.validation) == {"x": 6, "y": 6}
    held_out = {e.text for e in divided.validation}
    assert divided.train == tuple(e for e in dataset.train if e.text not in held_out)
    assert divided.test == dataset.test and len(divided.train) >= 70 - 12 - 10
    assert with_validation(divided, 2) == divided == with_validation(dataset, 1) != with_validation(dataset, 2)
    few = _write(tmp_path / "few.csv", [("a", "x"), ("b", "y")])
    with pytest.raises(DataError, match="few.csv, test.csv: expected at least 5 training texts of some label"):
        with_validation(load_files(few, test), 0)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([("a", "x"), ("b", "x")], None, "train.csv: expected at least two labels to tell apart, got only 'x'"),
        ([("a", "x"), ("b", "y")], None, "train.csv: expected test examples whose text is not trained on, got none"),
        (
            [("a", "x"), ("b", "y")],
            [("b", "x")],
            "test.csv: expected test examples whose text is not trained on, got none",
        ),
        (
            [("a", "x"), ("b", "y")],
            [("c", "x"), ("d", "z")],
            "test.csv, line 3: expected a label of training (x, y), got 'z'",
        ),
    ],
)
def test_says_what_is_wrong_with_two_files(tmp_path, train, test, message):
    train = _write(tmp_path / "train.csv", train)
    with pytest.raises(DataError, match=re.escape(message)):
        load_files(train, test and _write(tmp_path / "test.csv", test))
