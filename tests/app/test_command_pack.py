"""`hsaid pack`, `unpack` and `bound`, from end to end on a random model of two layers."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image
from test_cli import command, refusal

from hsaid_kernels.app import cli, training
from hsaid_kernels.app import trained as trained_runs
from hsaid_kernels.app.data import load_files
from hsaid_kernels.wrapper.checkpoint.packing import read_packed

pytest.importorskip("constriction")
pytest.importorskip("segno")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(files, out, "--bits", "4")) == 0
    return out


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "deep" / "task.hsz"
    assert cli.main(["pack", str(trained), "-o", str(out)]) == 0
    return out


def logits(source, files):
    return training.load_trained(source).logits(
        [e.text for e in load_files(files / "test.csv", files / "train.csv").test]
    )


def test_what_was_tuned_is_packed_without_loss(trained, packed, files, capsys):
    run = json.loads((trained / trained_runs.RUN_FILE).read_text())
    assert run["steps"] == 48  # 40, and a fifth of them on the levels
    assert logits(packed, files).equal(logits(trained, files))
    assert packed.stat().st_size < 300
    assert cli.main(["pack", str(trained), "-o", str(packed)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"packed +\d\d\d bytes in .*task.hsz\n +theta 1\d\d\.\d, multipliers \d\d\.\d, levels 4\.2, settings", said
    )


def test_info_and_predict_read_it(packed, files, tmp_path, capsys):
    assert cli.main(["info", str(packed)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"trained +d = 300 numbers: 281 in theta, m = 19 multipliers", said)
    assert re.search(r"labels +\['animal', 'fruit'\]", said) and "padding_rows {'bert.emb" in said
    assert cli.main(["predict", str(packed), "--data", str(files / "test.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 31


def test_unpack_gives_the_checkpoint_again(trained, packed, files, tmp_path):
    assert cli.main(["unpack", str(packed), "-o", str(tmp_path / "again")]) == 0
    names = sorted(path.name for path in tmp_path.joinpath("again").iterdir())
    assert names == sorted(path.name for path in trained.iterdir())
    assert logits(tmp_path / "again", files).equal(logits(trained, files))
    assert cli.main(["pack", str(tmp_path / "again"), "-o", str(tmp_path / "b.hsz")]) == 0
    assert (tmp_path / "b.hsz").read_bytes() == packed.read_bytes()


def test_text_and_qr_code(trained, packed, files, tmp_path):
    import segno

    text, image = tmp_path / "task.txt", tmp_path / "task.png"
    assert cli.main(["pack", str(trained), "-o", str(text), "--as", "text"]) == 0
    assert base64.b64decode(text.read_text()) == packed.read_bytes()
    assert cli.main(["pack", str(trained), "-o", str(image), "--as", "qr"]) == 0
    shown = Image.open(io.BytesIO(image.read_bytes())).convert("1")
    expected = segno.make_qr(text.read_text().strip(), error="l")
    width = len(expected.matrix) + 8
    assert shown.size == (4 * width, 4 * width)
    dark = [
        [not shown.getpixel((4 * (x + 4) + 1, 4 * (y + 4) + 1)) for x in range(width - 8)] for y in range(width - 8)
    ]
    assert dark == [[bool(module) for module in row] for row in expected.matrix]
    assert logits(text, files).equal(logits(trained, files))


def test_bound(trained, files, packed, capsys):
    assert cli.main(["bound", str(trained), "--delta", "0.1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"training +\d+ errors in n = 30 texts", said)
    assert re.search(
        r"bound +1\.0000 with probability 0\.9; VACUOUS: always saying the same label errs in 0\.5000", said
    )
    assert "drawn independently from the same distribution" in said and "pretrained on these texts, it does not" in said
    bits = float(re.search(r"described +by ([\d,.]+) bits", said)[1].replace(",", ""))
    found = read_packed(packed).bits
    assert bits == pytest.approx(sum(found.values()), abs=0.1)
    data = ["--data", str(files / "train.csv"), "--test-data", str(files / "test.csv")]
    assert cli.main(["bound", str(packed), *data, "--tried", "1024"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"described +by ([\d,.]+) bits", said)[1].replace(",", "")) == pytest.approx(
        sum(found.values()) - found["settings"] + 10, abs=0.1
    )


def test_bound_names_the_languages_of_training(trained, files, tmp_path, capsys, monkeypatch):
    """A model that knows no words, on names in English: a bound that does not hold for the test languages."""
    out = tmp_path / "cldr"
    arguments = ["train", "--model", str(files / "model"), "--out", str(out), "--intrinsic-dim", "50", "--steps", "1"]
    arguments += ["--train-languages", "en", "--test-languages", "nl", "--max-length", "8", "--threads", "1"]
    assert cli.main([*arguments]) == 0
    capsys.readouterr()
    assert cli.main(["bound", str(out)]) == 0
    assert "on new texts in en, and not those in the test languages" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "nowhere"], "directory: expected one with a checkpoint, got no file"),
        (["pack", "nowhere", "--bits", "0"], "--bits: expected an integer from 1 to 16, got '0'"),
        (["pack", "nowhere", "--bits", "17"], "--bits: expected an integer from 1 to 16, got '17'"),
        (["pack", "nowhere", "--as", "fax"], "invalid choice: 'fax'"),
        (["unpack", "nowhere", "-o", "x"], "No such file"),
        (["bound", "nowhere"], "directory: expected one"),
        (["bound", "nowhere", "--delta", "1"], "--delta: expected a probability between 0 and 1, got '1'"),
        (["bound", "nowhere", "--tried", "0"], "--tried: expected an integer from 1"),
        (["train", "--bits", "17"], "--bits: expected an integer from 1 to 16"),
    ],
)
def test_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, arguments)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_packed_checkpoint(trained, packed, files, tmp_path, capsys):
    broken = tmp_path / "broken.hsz"
    broken.write_bytes(packed.read_bytes()[:-9])
    for words in (
        ["info", str(broken)],
        ["predict", str(broken), "--data", str(files / "test.csv")],
        ["bound", str(broken)],
    ):
        assert "got a truncated or corrupted one" in refusal(capsys, words)
    assert "got something else" in refusal(capsys, ["unpack", str(files / "train.csv"), "-o", str(tmp_path / "x")])
    message = refusal(capsys, ["bound", str(packed)])
    assert "--data: expected the texts of training, or their --train-languages" in message
    config = trained / trained_runs.RUN_FILE
    run = json.loads(config.read_text())
    other = tmp_path / "other"
    assert cli.main(["unpack", str(packed), "-o", str(other)]) == 0
    (other / trained_runs.RUN_FILE).write_text(json.dumps(run | {"examples": run["examples"] | {"digest": "00"}}))
    capsys.readouterr()
    assert "--data: expected the texts of training, got 30 others in" in refusal(capsys, ["bound", str(other)])


def test_a_qr_code_that_would_be_too_large(trained, tmp_path, capsys):
    values = training.load_trained(trained)
    values.model.save_pretrained(tmp_path)  # without training.json
    from hsaid_kernels.app import command_pack

    with pytest.raises(ValueError, match="--as qr: expected a checkpoint of at most 2,214 bytes, got 2,215"):
        command_pack.qr(bytes(2215))
    assert command_pack.qr(bytes(2214))[:4] == b"\x89PNG"
    assert "which does not say its model" in _unpacked(tmp_path, capsys)


def _unpacked(directory, capsys):
    assert cli.main(["pack", str(directory), "-o", str(directory / "t.hsz")]) == 0
    capsys.readouterr()
    return refusal(capsys, ["unpack", str(directory / "t.hsz"), "-o", str(directory / "x")])


def test_another_w0_is_refused(packed, files, tmp_path, capsys):
    from transformers import BertModel

    model = BertModel.from_pretrained(files / "model")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5] += 1
    model.save_pretrained(tmp_path / "model")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((files / "model" / name).read_bytes())
    capsys.readouterr()
    words = ["unpack", str(packed), "-o", str(tmp_path / "x"), "--model", str(tmp_path / "model")]
    assert "model: W0 is not what was trained from in some of 41 tensors" in refusal(capsys, words)
