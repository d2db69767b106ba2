"""`hsaid predict`: a line for each text, with the label that the trained classifier gives it."""

import csv
import json
import re

import pytest
import torch
from test_cli import command, refusal

from hsaid_kernels.app import cli, command_predict, training
from hsaid_kernels.app.data import read_examples, read_texts

TEXTS = ["apple cherry", "dog mouse", "mouse cat", "lemon grape", "tiger horse", "cherry lemon"]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(files, out)) == 0
    return out


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "\n".join(TEXTS))
    return path


def test_lines_separated_by_tabs(trained, texts, capsys, monkeypatch):
    monkeypatch.setattr(command_predict, "TEXTS", 4)  # at a time
    capsys.readouterr()
    assert cli.main(["predict", str(trained), "--data", str(texts)]) == 0
    header, *lines = csv.reader(capsys.readouterr().out.splitlines(), delimiter="\t")
    assert header == ["text", "label", "probability"]
    assert [line[0] for line in lines] == TEXTS
    classifier = training.load_trained(trained)
    assert [line[1] for line in lines] == classifier.predict(TEXTS)
    assert [line[1] for line in lines] == ["fruit", "animal", "animal", "fruit", "animal", "fruit"]
    shares = classifier.logits(TEXTS).softmax(-1).max(-1).values.tolist()
    assert [line[2] for line in lines] == [f"{share:.4f}" for share in shares]


def test_json(trained, texts, capsys):
    capsys.readouterr()
    assert cli.main(["predict", str(trained), "--data", str(texts), "--format", "jsonl", "--threads", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shares = training.load_trained(trained).logits(TEXTS).softmax(-1)
    for line, text, share in zip(lines, TEXTS, shares, strict=True):
        assert line["text"] == text and list(line["probabilities"]) == ["animal", "fruit"]
        assert torch.allclose(torch.tensor(list(line["probabilities"].values())), share, atol=1e-6)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)


def test_what_it_prints_can_be_trained_on(trained, tmp_path, capsys):
    """Texts of a csv file may have tabs and line breaks, which tab-separated lines cannot."""
    path = tmp_path / "texts.csv"
    path.write_text('label,name\nx,"apple\tcherry"\ny,"dog\ncat"\nz,ä "" ü\n')
    capsys.readouterr()
    assert cli.main(["predict", str(trained), "--data", str(path), "--text-column", "name"]) == 0
    (tmp_path / "again.tsv").write_text(capsys.readouterr().out)
    examples = read_examples(tmp_path / "again.tsv")
    assert [example.text for example in examples] == ["apple cherry", "dog cat", 'ä "" ü']
    assert [example.label for example in examples[:2]] == ["fruit", "animal"]


def test_texts_of_every_format(tmp_path):
    """With labels and without."""
    for name, lines in {
        "a.csv": ["text", '"a, b"', "c"],
        "a.tsv": ["text\tlabel", "a, b\tx", "c\ty"],
        "a.jsonl": ['{"text": "a, b"}', "", '{"text": "c", "label": 3}'],
    }.items():
        (tmp_path / name).write_text("\n".join(lines))
        assert read_texts(tmp_path / name) == ["a, b", "c"]


def test_refusals(files, trained, texts, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        return refusal(capsys, ["predict", *map(str, arguments)])

    assert "required: --data" in refused(trained)
    assert "no.csv: expected a file that can be read" in refused(trained, "--data", "no.csv")
    (tmp_path / "a.txt").write_text("text\nx")
    assert "expected a file name ending in .csv, .tsv, .jsonl, got '.txt'" in refused(
        trained, "--data", tmp_path / "a.txt"
    )
    message = refused(trained, "--data", texts, "--text-column", "name")
    assert "texts.csv, line 1: expected a column 'name', got text" in message
    (tmp_path / "bad.csv").write_text('text\nx\n" "\n')
    assert "bad.csv, line 3: expected text in 'text', got ' '" in refused(trained, "--data", tmp_path / "bad.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}')
    assert "line 1: expected text in 'text', got 3" in refused(trained, "--data", tmp_path / "bad.jsonl")
    assert "expected one that `hsaid train` wrote, got no file" in refused(tmp_path, "--data", texts)
    assert re.search("got 'nowhere'", refused(trained, "--data", texts, "--model", "nowhere"))
    assert "invalid choice: 'xml'" in refused(trained, "--data", texts, "--format", "xml")
