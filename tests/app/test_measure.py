"""`hsaid measure` from end to end on a random model of two layers, and what it says to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from hsaid_kernels.app import cli, data, training
from hsaid_kernels.app.command_measure import TextClassification
from hsaid_kernels.app.measure.compare import METHODS, TRAINED_FILE, adapted, check_method
from hsaid_kernels.measure import Run
from hsaid_kernels.wrapper.checkpoint.files import read_config

PROGRAM = "import sys; from hsaid_kernels.app.cli import main; sys.exit(main(sys.argv[1:]))"


def command(files, out, *more):
    return [
        *("measure", "--model", str(files / "model"), "--data", str(files / "train.csv"), "--out", str(out)),
        *("--test-data", str(files / "test.csv"), "--max-length", "8", "--batch-size", "8", "--steps", "60"),
        *("--methods", "did", "hsaid-3", "--dims", "30", "300", "--seeds", "2", "--refine", "0", "--threads", "1"),
        *more,
    ]


def refusal(capsys, arguments, code=2):
    capsys.readouterr()
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith("hsaid: ") or "\nhsaid: " in said.err
    return said.err.splitlines()[-1]


@pytest.fixture(scope="module")
def measured(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "out"
    assert cli.main(command(files, out, "--compare", "bitfit")) == 0
    return out


def test_everything_is_there(files, measured, capsys):
    assert cli.main(["measure", "--resume", "--out", str(measured)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"data +train.csv, test.csv: which of 2 labels", said) and "validate   6 texts" in said
    results = json.loads((measured / "results.json").read_text())
    assert results["runs_left"] == 0 and set(results["dimensions"]) == {"did", "hsaid-3"}
    assert results["settings"]["steps"] == 60 and results["chance"] == 0.5
    points = {(point["method"], point["d"]): point for point in results["points"]}
    assert set(points) == {(m, d) for m in ("did", "hsaid-3") for d in (30, 300)} | {("full", None), ("bitfit", None)}
    assert all(len(point["runs"]) == 2 and len(point["validation_by_lr"]) >= 3 for point in points.values())
    assert (measured / "table.md").read_text().strip() in said
    assert (measured / "dimension.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_of_a_run_gives_its_score(files, measured, capsys):
    results = json.loads((measured / "results.json").read_text())
    point = next(point for point in results["points"] if point["method"] == "hsaid-3" and point["d"] == 300)
    folder = measured / "runs" / f"hsaid-3 d=300 lr={point['lr']:g} seed=1"
    classifier = training.load_trained(folder)
    test = data.load_files(files / "train.csv", files / "test.csv").test
    assert training.evaluate(classifier, test).accuracy == point["runs"][1]["test"]
    assert cli.main(["info", str(folder)]) == 0
    assert "30" in capsys.readouterr().out


def test_the_same_command_again_starts_no_run(files, measured, capsys):
    before = {path: path.stat().st_mtime_ns for path in (measured / "runs").rglob("*")}
    for arguments in (command(files, measured, "--compare", "bitfit"), ["measure", "--resume", "--out", str(measured)]):
        assert cli.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (measured / "runs").rglob("*")} == before
    assert (measured / "table.md").read_text().strip() in capsys.readouterr().out


def test_a_study_can_be_extended(files, measured, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.db").write_bytes((measured / "study.db").read_bytes())
    assert cli.main(["measure", "--resume", "--out", str(out), "--methods", "did", "--dims", "30", "100", "300"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [point["d"] for point in results["points"]] == [None, 30, 100, 300, None]
    assert {path.name.split(" lr")[0] for path in (out / "runs").iterdir()} == {"did d=100"}


@pytest.mark.parametrize(
    "more, difference",
    [
        (["--steps", "30"], "steps was 60 and is now 30"),
        (["--batch-size", "4"], "batch_size was 8 and is now 4"),
        (["--profile", "full"], "steps was 60 and is now 300"),
        (["--normalize", "tensor"], "normalize was 'global' and is now 'tensor'"),
        (["--dropout"], "dropout was False and is now True"),
        (["--seed", "5"], "examples (digest) was '"),
    ],
)
def test_other_settings_are_refused_with_the_difference(files, measured, capsys, more, difference):
    before = (measured / "results.json").read_bytes()
    commands = [["measure", "--resume", "--out", str(measured), *more]]
    if "--profile" not in more:  # here the command's --steps is given beside it
        commands.append(command(files, measured, *more))
    for arguments in commands:
        message = refusal(capsys, arguments)
        assert "was made with other settings: " in message and difference in message
    assert (measured / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "said", "--dims", "5", "10"], "dims: expected some d above the 41 multipliers of 'said', got"),
        (["--methods", "L1|L9"], "L9"),
        (["--dims", "300", "30"], "dims: expected increasing numbers above 0, got [300, 30]"),
        (
            ["--compare", "lora,gpt"],
            "compare: expected some of lora, vera, unilora, fourierft, bitfit, gpart, got 'gpt'",
        ),
        (["--compare", "bitfit:3"], "compare: expected no size, because BitFit trains all biases, got 'bitfit:3'"),
        (["--threshold", "1.2"], "expected a share above 0 and at most 1, got '1.2'"),
        (["--storage", "postgresql://me:secret@127.0.0.1:1/none"], "storage: expected a database"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--resume"], "no such file"),
    ],
)
def test_bad_input_leaves_nothing_behind(files, tmp_path, capsys, more, message):
    said = refusal(capsys, command(files, tmp_path / "out", *more))
    assert message in said and "secret" not in said
    assert not list(tmp_path.iterdir())


def test_show_shows_and_changes_nothing(files, measured, tmp_path, capsys):
    assert "no such file" in refusal(capsys, ["measure", "--show", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
    message = refusal(capsys, ["measure", "--show", "--out", str(measured), "--seeds", "7"])
    assert message == "hsaid: --show: expected no settings beside it, got --seeds"
    out = tmp_path / "elsewhere"  # where there is neither data nor model
    storage = f"sqlite:///{measured / 'study.db'}"
    assert cli.main(["measure", "--show", "--out", str(out), "--storage", storage]) == 0
    assert (out / "table.md").read_text() == (measured / "table.md").read_text()
    assert (out / "dimension.png").read_bytes() == (measured / "dimension.png").read_bytes()


def test_a_training_that_fails(files, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(training, "training_steps", fails)
    message = refusal(capsys, command(files, tmp_path / "out", "--study", "mine"), code=1)
    again = f"go on with: hsaid measure --resume --out {tmp_path / 'out'} --study mine"
    assert message == f"hsaid: RuntimeError: CUDA out of memory ({again})"


def test_a_baseline_that_does_not_beat_the_majority(files, tmp_path, capsys):
    for name in ("train", "test"):
        rows = [f"text {name} {i},{'rare' if i % 5 == 0 else 'usual'}\n" for i in range(50)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    arguments = command(files, tmp_path / "out", "--data", str(tmp_path / "train.csv"), "--steps", "3")
    arguments[arguments.index("--test-data") + 1] = str(tmp_path / "test.csv")
    message = refusal(capsys, arguments, code=1)
    assert "expected full fine-tuning to beat 0.800, which needs no training, got 0.800: train for more" in message
    assert not any(path.name.startswith("did") for path in (tmp_path / "out").rglob("*"))


def test_interrupted_and_resumed(files, measured, tmp_path, capsys):
    out = tmp_path / "my out"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command(files, out, "--workers", "2", "--compare", "bitfit")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(1200):
        if (out / "runs").exists() and len(list((out / "runs").iterdir())) >= 2:
            break
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"hsaid: interrupted; go on with: hsaid measure --resume --out '{out}' --workers 2"
    assert "Traceback" not in said
    assert cli.main(["measure", "--resume", "--out", str(out)]) == 0
    tables = [(folder / "table.md").read_text() for folder in (measured, out)]
    rows = [[line.split("|") for line in table.splitlines()] for table in tables]
    first, second = ([row[:-2] if len(row) > 4 else row for row in table] for table in rows)  # without the seconds
    assert first == second


def test_methods_of_peft_by_name():
    assert check_method("bitfit") == ("bitfit", None)
    for bad in ("", "full", "bitfit:1", "lora:", "lora:0", "lora:-1", "lora:x"):
        with pytest.raises(ValueError, match="compare: expected"):
            check_method(bad)


def test_bitfit_trains_biases_and_the_head(files):
    model = training.build_classifier(str(files / "model"), ["a", "b"], 0, 8).model
    assert Run("bitfit", None, 0.1, 0).wrap(model) is model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith("bias") or n.startswith("classifier.")}
    with pytest.raises(ValueError, match="model: expected a sequence classifier of transformers, got BertModel"):
        adapted(model.bert, "bitfit", 0)
    assert set(METHODS) == {"lora", "vera", "unilora", "fourierft", "bitfit", "gpart"}


def test_gpart_is_an_isometry_on_the_linear_layers(files):
    build = lambda: training.build_classifier(str(files / "model"), ["a", "b"], 0, 8)  # noqa: E731
    plain, classifier = build(), build()
    model = adapted(classifier.model, "gpart:40", 3)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    (theta,) = (parameter for name, parameter in trained.items() if not name.startswith("classifier."))
    assert theta.shape == (40,) and not theta.any()
    texts = ["one text", "another"]
    assert torch.equal(classifier.logits(texts), plain.logits(texts))
    layers = [module for module in model.bert.modules() if isinstance(module, torch.nn.Linear)]
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        theta.normal_()
    moved = sum((layer.weight - weight).square().sum() for layer, weight in zip(layers, before, strict=True))
    assert moved.item() == pytest.approx(theta.square().sum().item(), rel=1e-5)
    again = adapted(build().model, "gpart:40", 3)
    with torch.no_grad():
        next(p for n, p in again.named_parameters() if p.requires_grad and len(p) == 40).copy_(theta)
    other = (m for m in again.bert.modules() if isinstance(m, torch.nn.Linear))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, other, strict=True))


def test_a_run_that_is_certified(files, tmp_path):
    """Its scores are those without bits; the errors are counted on the training texts, on the levels."""
    dataset = data.with_validation(data.load_files(files / "train.csv", files / "test.csv"), 0)
    options = dict(max_length=8, steps=40, batch_size=8, dropout=False, normalize="global", diagonal="gaussian")
    run = Run("did", 300, 0.05, 0, tmp_path)
    plain = TextClassification(str(files / "model"), dataset, **options)(run)
    found = TextClassification(str(files / "model"), dataset, **options, bits=3)(run)
    assert (found.validation, found.test, found.trained) == (plain.validation, plain.test, plain.trained)
    assert found.examples == len(dataset.train) == 24
    assert found.train_error * 24 == round(found.train_error * 24) and found.train_error <= 0.25
    assert 300 < found.bits < 3 * 300 + 3 * 17
    assert plain.bits is None


def test_a_study_of_one_chunk_a_block_beside_gpart(files, tmp_path, capsys):
    more = ("--compare", "gpart:40,gpart:80", "--chunks", "one", "--width", "64")
    arguments = command(files, tmp_path, *more)
    design = ["did", "did:rademacher:128", "--dims", "300", "--seeds", "1"]
    arguments[arguments.index("--methods") + 1 : arguments.index("--seeds") + 2] = design
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} " in said for name in ("DID", "DID, rademacher, n = 128", "GPart 40", "GPart 80"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["chunks"] == "one" and results["settings"]["width"] == 64
    (gpart,) = (point for point in results["points"] if point["method"] == "gpart:40")
    assert len(gpart["runs"]) == 1
    saved = next(path for path in (tmp_path / "runs").iterdir() if path.name.startswith("gpart"))
    assert (saved / TRAINED_FILE).stat().st_size > 4 * 40
    configurations = [read_config(path) for path in (tmp_path / "runs").iterdir() if path.name.startswith("did")]
    assert {(c["chunks"], c["width"], c["diagonal"]) for c in configurations} == {
        ("one", 64, "gaussian"),
        ("one", 128, "rademacher"),
    }
