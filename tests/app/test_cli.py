"""`hsaid` from end to end on a random model of two layers, and what it says to bad input."""

import errno
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from words import ANIMALS, FRUIT, WORDS

from hsaid_kernels import files as files_module
from hsaid_kernels.app import architecture, cli, inputs, training
from hsaid_kernels.app import trained as trained_runs
from hsaid_kernels.app.data import load_files
from hsaid_kernels.wrapper.checkpoint import files as checkpoint
from hsaid_kernels.wrapper.heads import prune_heads, remove
from hsaid_kernels.wrapper.hsaid import HSAID


def command(files, out, *more):
    return [
        *("train", "--model", str(files / "model"), "--data", str(files / "train.csv"), "--out", str(out)),
        *("--test-data", str(files / "test.csv"), "--intrinsic-dim", "300", "--max-length", "8"),
        *("--steps", "40", "--lr", "0.02", "--threads", "1", *more),
    ]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    assert cli.main(command(files, out)) == 0
    return out


def test_train_learns_and_reloads(files, trained, tmp_path, capsys):
    assert cli.main(command(files, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    accuracy = float(re.search(r"accuracy +(\S+) on texts not trained on; 0.500 by always saying 'animal'", said)[1])
    assert accuracy > 0.8
    assert re.search(r"partition +L1\+L2\|L3\|L4: L1\+L2: 9, L3: 8, L4: 2 -> 19 multipliers", said)
    assert re.search(r"trained +d = 300 numbers: 281 in theta, 19 multipliers", said)
    assert re.search(r"step +\d+ ms: projection +\d+\.\d%", said)
    again = re.search(r"reloaded .* accuracy (\S+), the same to the last digit", said)[1]
    assert json.loads((tmp_path / "out" / trained_runs.RUN_FILE).read_text())["test_accuracy"] == float(again)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert f"checkpoint   {size:,} bytes" in said
    assert size < 16384


def test_train_twice_gives_the_same_checkpoint(files, trained, tmp_path):
    assert cli.main(command(files, tmp_path / "out")) == 0
    first, second = (load_file(out / checkpoint.VALUES_FILE) for out in (trained, tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in ("theta", "multipliers"))


def test_train_a_model_without_a_padding_token(files, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("</s>", *FRUIT, *ANIMALS))}, unk_token="</s>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "model")
    GPT2Model(GPT2Config(vocab_size=13, n_positions=16, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "model"
    )
    assert cli.main(command(files, tmp_path / "out", "--model", str(tmp_path / "model"), "--steps", "2")) == 0
    assert "the same to the last digit" in capsys.readouterr().out


def test_losses_are_the_same_to_the_last_bit(files):
    dataset = load_files(files / "train.csv", files / "test.csv")

    def losses(seed):
        classifier = training.build_classifier(str(files / "model"), dataset.labels, seed, 8)
        classifier.model = HSAID(classifier.model, 300, seed=seed)
        batches = training.training_batches(classifier, dataset.train, 5, seed)
        options = {"steps": 8, "lr": 0.01, "seed": seed, "dropout": True}
        return [step.loss for step in training.training_steps(classifier.model, batches, **options)]

    first = losses(0)
    assert len(set(first)) == 8
    assert losses(0) == first
    assert losses(1) != first


def test_a_step_is_the_sum_of_its_parts(files):
    dataset = load_files(files / "train.csv", files / "test.csv")
    classifier = training.build_classifier(str(files / "model"), dataset.labels, 0, 8)
    classifier.model = HSAID(classifier.model, 300)
    batches = training.training_batches(classifier, dataset.train, 5, 0)
    for step in training.training_steps(classifier.model, batches, steps=3, lr=0.01, seed=0):
        assert tuple(step.seconds) == training.PARTS
        assert all(seconds > 0 for seconds in step.seconds.values())
    assert not classifier.model.model._forward_pre_hooks


def test_load_trained(files, trained):
    classifier = training.load_trained(trained)
    assert set(classifier.predict(["apple mango", "dog", "mouse cat"])) <= set(WORDS)
    values = load_file(trained / checkpoint.VALUES_FILE)
    assert torch.equal(classifier.model.theta, values["theta"])
    assert classifier.model.config.id2label == {0: "animal", 1: "fruit"}


def test_load_trained_refuses_another_w0(files, trained, tmp_path):
    """The head is random: with another seed theta would be added to something else."""
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = json.loads((trained / trained_runs.RUN_FILE).read_text())
    (tmp_path / trained_runs.RUN_FILE).write_text(json.dumps(run | {"seed": 1}))
    with pytest.raises(ValueError, match=r"W0 is not what was trained from.*classifier\.weight"):
        training.load_trained(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "got no file"),
        ("{", ValueError, "damaged"),
        ("[]", ValueError, "damaged"),
        ('{"model": "x"}', ValueError, "no labels, max_length, seed"),
    ],
)
def test_load_trained_says_what_is_missing(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / trained_runs.RUN_FILE).write_text(content)
    with pytest.raises(error, match=message):
        training.load_trained(tmp_path)


def test_info_of_a_checkpoint(trained, capsys):
    assert cli.main(["info", str(trained)]) == 0
    said = capsys.readouterr().out
    assert "d = 300 numbers: 281 in theta, m = 19 multipliers" in said
    assert re.search(r"seed +0\n", said)
    check_multipliers(said, trained)


@pytest.mark.parametrize("arguments", [["--help"], ["info", "CHECKPOINT"], ["info", "MODEL"]], ids=lambda a: a[0])
def test_nobody_reads_to_the_end(arguments, files, trained):
    """As in `hsaid info ... | head`: no traceback, and the exit code that shells give such a process."""
    places = {"CHECKPOINT": str(trained), "MODEL": str(files / "model")}
    program = "import sys; from hsaid_kernels.app.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *(places.get(a, a) for a in arguments)]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # argparse hides what goes wrong while it prints
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def check_multipliers(said: str, checkpoint_at):
    """All of them are listed, by component, the largest change first."""
    listed = re.search(r"^multipliers +by component, the largest change from 1 first\n(.*)", said, re.M | re.S)[1]
    values = load_file(checkpoint_at / checkpoint.VALUES_FILE)["multipliers"].tolist()
    components = re.split(r"^(?=L)", listed, flags=re.M)[1:]
    for component, learned in zip(components, (values[:9], values[9:17], values[17:]), strict=True):
        shown = [float(value) for value in re.findall(r" (-?\d+\.\d{3})(?:,|$)", component, re.M)]
        assert shown == [round(value, 3) for value in sorted(learned, key=lambda value: -abs(value - 1))]
    weight, bias = values[17:]
    assert re.search(rf"^L4 +.*weight {weight:.3f}", listed, re.M) and f"bias {bias:.3f}" in listed
    assert re.search(r"^L1\+L2 +(embeddings|pooler|classifier|layer\.\d \w+) \d", listed, re.M)


@pytest.fixture
def by_hand(files, tmp_path):
    """A checkpoint that says nothing about its model, which has more labels and words than the directory's."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=5)
    model.resize_token_embeddings(20)
    hsaid = HSAID(model, 50)
    with torch.no_grad():
        hsaid.multipliers.uniform_(0.5, 1.5)
    hsaid.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_info_of_a_checkpoint_made_by_hand(files, by_hand, capsys):
    assert cli.main(["info", str(by_hand)]) == 0
    assert re.search(r"^multipliers +--model MODEL, ", capsys.readouterr().out, re.M)
    assert cli.main(["info", str(by_hand), "--model", str(files / "model")]) == 0
    check_multipliers(capsys.readouterr().out, by_hand)


def test_graph_of_mbert(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, counts in (
        ([], "17 nodes"),
        (["--fold"], "17 nodes"),
        (["--no-fold", "--partition", "L1+L2|L3|L4"], "28 nodes, 49 multipliers"),
        (["--partition", "said"], "17 nodes, 201 multipliers"),
    ):
        assert cli.main(["graph", architecture.MBERT, "--out", "mbert.dot", *more]) == 0
        assert capsys.readouterr().out == f"graph        mbert.dot: 201 tensors, 201 paths, {counts}\n"
    pytest.importorskip("pygraphviz")
    assert cli.main(["graph", architecture.MBERT]) == 0
    assert b"201 tensors, 201 paths" in (tmp_path / "graph.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.svg", "mbert.dot"]


def test_graph_of_a_checkpoint(files, trained, by_hand, tmp_path, capsys):
    dot = tmp_path / "a.dot"
    model = ["--model", str(files / "model")]
    for source, more in ((trained, []), (trained, model), (by_hand, model)):
        assert cli.main(["graph", str(source), "-o", str(dot), *more]) == 0
        assert capsys.readouterr().out == f"graph        {dot}: 41 tensors, 41 paths, 21 nodes, 19 multipliers\n"
        values = load_file(source / checkpoint.VALUES_FILE)["multipliers"].tolist()
        labels = re.findall(r'label="(\S+)  (-?\d\.\d{3})"', dot.read_text())
        assert sorted(value for _, value in labels) == sorted(f"{value:.3f}" for value in values)
        assert ("weight", f"{values[17]:.3f}") in labels and ("embeddings", f"{values[0]:.3f}") in labels
    assert re.search(r"41 tensors, 41 paths, \d+,\d{3} weights", dot.read_text())
    weights = sum(map(math.prod, checkpoint.read_config(by_hand)["tensors"].values()))
    assert f"{weights:,} weights" in dot.read_text()


def test_graph_and_info_of_heads(files, tmp_path, capsys):
    for arguments, counts in (
        (["--heads"], "18 nodes"),
        (["--partition", "L1+L5|L3|L4"], "18 nodes, 169 multipliers"),
        (["--partition", "L1+L2|L3|L4|L5", "--no-fold"], "40 nodes, 61 multipliers"),
    ):
        assert cli.main(["graph", architecture.MBERT, "--out", str(tmp_path / "a.dot"), *arguments]) == 0
        assert f"201 tensors, 1125 paths, {counts}\n" in capsys.readouterr().out
    assert cli.main(["info", architecture.MBERT, "--heads"]) == 0
    said = capsys.readouterr().out
    assert "201 tensors in 1125 segments, 177,854,978 weights; nodes: L1 15, L2 3, L3 8, L4 2, L5 12\n" in said
    assert "L1+L5|L3|L4  L1+L5: 159, L3: 8, L4: 2 -> 169 multipliers\n" in said

    classifier = training.build_classifier(str(files / "model"), ["a", "b"], 0, 8)
    remove(prune_heads(classifier.model, {1: [0]}))
    hsaid = HSAID(classifier.model, 50, "L1+L5|L3|L4")
    with torch.no_grad():
        hsaid.multipliers[hsaid.partition.components[0].paths.index(("layer.0", "head.1"))] = 2.5
    hsaid.save_pretrained(tmp_path)
    model = ["--model", str(files / "model")]
    assert cli.main(["info", str(tmp_path), *model]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^L1\+L5 +layer.0 head.1 2.500, ", said, re.M)
    assert "pruned       {'bert.encoder.layer.1.attention.self': [0]}\n" in said and "layer.1 head.0" not in said
    assert cli.main(["graph", str(tmp_path), *model, "-o", str(tmp_path / "a.dot")]) == 0
    assert "head.1  2.500" in (tmp_path / "a.dot").read_text()
    expected = f"--heads: expected with a model only, got it with the checkpoint {str(tmp_path)!r}"
    assert expected in refusal(capsys, ["graph", str(tmp_path), *model, "--heads"])


def test_graph_of_some_tensors(files, tmp_path, capsys):
    """Those that were not trained are left out."""
    classifier = training.build_classifier(str(files / "model"), ["a", "b"], 0, 8)
    HSAID(classifier.model, 50, exclude="embeddings").save_pretrained(tmp_path)
    arguments = ["graph", str(tmp_path), "--model", str(files / "model"), "-o", str(tmp_path / "a.dot")]
    assert cli.main(arguments) == 0
    assert "36 tensors, 36 paths" in capsys.readouterr().out
    assert "embeddings" not in (tmp_path / "a.dot").read_text()


def test_info_of_a_model(files, capsys):
    assert cli.main(["info", str(files / "model")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("41 tensors, ")
    assert re.search(r"L1\+L2\|L3\|L4 +L1\+L2: 9, L3: 8, L4: 2 -> 19 multipliers", said)


def test_info_of_mbert_needs_no_hub(capsys):
    assert cli.main(["info", architecture.MBERT]) == 0
    said = capsys.readouterr().out
    assert said.startswith("201 tensors, 177,854,978 weights")
    assert "L1+L2: 39, L3: 8, L4: 2 -> 49 multipliers" in said


def test_graph_refuses(files, trained, by_hand, tmp_path, capsys):
    dot = tmp_path / "a.dot"

    def refused(*arguments):
        message = refusal(capsys, ["graph", *map(str, arguments), "-o", str(dot)])
        assert not dot.exists()
        return message

    assert "--partition: expected none, as a checkpoint has its own, got 'said'" in refused(
        trained, "--partition", "said"
    )
    assert "--model: expected the one that " in refused(by_hand)
    model = str(files / "model")
    assert f"--model: expected with a checkpoint only, got it with {model!r}" in refused(model, "--model", model)
    message = refused(by_hand, "--model", architecture.MBERT)
    assert "model: expected the 41 tensors that were trained, got others: 'bert.embeddings.word_emb" in message
    assert "in place of (20, 32)" in message
    assert "with unknown 'L9'" in refused(model, "--partition", "L9")
    assert "expected the directory or hub name of a model, got 'nowhere'" in refused("nowhere")
    values = (by_hand / checkpoint.VALUES_FILE).read_bytes()
    (by_hand / checkpoint.VALUES_FILE).write_bytes(values[:-1])
    assert "expected a whole checkpoint, got a truncated" in refused(by_hand, "--model", model)


def test_graph_out_that_cannot_be(files, tmp_path, capsys):
    for name, message in (("a.pdf", "a name that ends in .svg, .png, .dot or .html"), ("no/a.dot", "can be written")):
        assert message in refusal(capsys, ["graph", str(files / "model"), "-o", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_version_and_help(capsys):
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as end:
            cli.main([argument])
        assert end.value.code == 0
    assert re.match(r"hsaid \d+\.\d+\.\d+\n", capsys.readouterr().out)


BARS = ("training:", "tuning in", "merging:")  # of progress


def refusal(capsys, arguments, code=2):
    """The one sentence on stderr."""
    assert cli.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and not line.lstrip("\r").startswith(BARS)]
    assert len(lines) == 1
    assert lines[0].startswith("hsaid: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--intrinsic-dim", "0"], "--intrinsic-dim: expected an integer from 1 to 16777216, got '0'"),
        (["train", "--intrinsic-dim", "16777217"], "expected an integer from 1 to 16777216, got '16777217'"),
        (["train", "--intrinsic-dim", "many"], "expected an integer from 1 to 16777216, got 'many'"),
        (["train", "--seed", str(2**64)], f"expected an integer from 0 to {2**64 - 1}, got '{2**64}'"),
        (["train", "--seed", "-1"], "expected an integer from 0"),
        (["train", "--threads", "0"], "--threads: expected an integer from 1 to"),
        (["train", "--lr", "-0.1"], "--lr: expected a number above 0, got '-0.1'"),
        (["train", "--lr", "nan"], "--lr: expected a number above 0, got 'nan'"),
        (["train", "--steps", "1", "--epochs", "1"], "not allowed with"),
        (["train", "--diagonal", "cauchy"], "invalid choice: 'cauchy'"),
        (["train", "--test-data", "x.csv"], "--test-data: expected --data FILE to train on, got only x.csv"),
        (["train", "--train-languages", "en", "xx"], "got 'xx'"),
        (["train", "--data", "no.csv"], "no.csv: expected a file that can be read, got: No such file"),
        (["info", "no/such/model", "--model", "x"], "--model: expected with a checkpoint only"),
        (["info", "no/such/model"], "model: expected the directory or hub name of a model, got 'no/such/model'"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in refusal(capsys, arguments)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--intrinsic-dim", "19"], "expected more than the 19 multipliers of 'L1+L2|L3|L4', got 19"),
        (["--partition", "L1+L9"], "with unknown 'L9'"),
        (["--partition", "L1|L1"], "with L1 2 times"),
        (["--label-column", "class"], "train.csv, line 1: expected a column 'class', got text, label"),
        (["--model", "nowhere"], "expected the directory or hub name of a model, got 'nowhere'"),
        (["--max-length", "17"], "max_length: expected at most the model's 16 positions, got 17"),
    ],
)
def test_bad_input_leaves_nothing_behind(files, tmp_path, capsys, more, message):
    assert message in refusal(capsys, command(files, tmp_path / "out", *more))
    assert not list(tmp_path.iterdir())


def test_out_that_is_no_directory(files, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "--out: expected a directory that can be written to, got " in refusal(capsys, command(files, out))


def test_out_without_permission(files, tmp_path, capsys, monkeypatch):
    """By a stand-in for the file system's refusal, because the tests may run as root, who may write anywhere."""

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(inputs.tempfile, "TemporaryFile", refuse)
    message = refusal(capsys, command(files, tmp_path / "out"))
    assert message.endswith(f"got {tmp_path / 'out'}: Permission denied")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [(training.Path, "write_text"), (files_module.os, "fsync")], ids=["run", "values"])
def test_disk_full_while_saving(files, trained, tmp_path, capsys, monkeypatch, where):
    """One sentence, no half-written file, and the older checkpoint is still there."""
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*where, refuse)
        assert "No space left on device" in refusal(capsys, command(files, tmp_path, "--steps", "2", "--seed", "5"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in trained.iterdir()
    }


def test_a_loss_that_is_not_finite(files, tmp_path, capsys, monkeypatch):
    message = refusal(capsys, command(files, tmp_path / "out", "--lr", "1e30"), code=1)
    assert re.search(r"the loss is (nan|inf) at step \d+: try an --lr lower than 1e\+30", message)
    assert not list(tmp_path.iterdir())


def test_a_reload_that_differs(files, tmp_path, capsys, monkeypatch):
    right = training.evaluate

    def wrong(classifier, examples):
        monkeypatch.setattr(training, "evaluate", lambda *_: training.Evaluation((), 0.0, {}))
        return right(classifier, examples)

    monkeypatch.setattr(training, "evaluate", wrong)
    message = refusal(capsys, command(files, tmp_path / "out", "--steps", "2"), code=1)
    assert re.search(r"expected the accuracy 0\.\d+ after reloading .*, got 0\.0", message)


def test_mbert_steps(files, tmp_path, capsys, monkeypatch):
    """With a vocabulary and layers cut down: the real size takes gigabytes."""
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(training, "MBERT_CONFIG", training.MBERT_CONFIG | small)
    assert cli.main(command(files, tmp_path / "out", "--steps", "1", "--mbert-steps", "2")) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +\d+\.\d+(?: +\d+\.\d{4}){5}$", said, re.MULTILINE)
    assert rows == ["1", "2"]


def test_info_checks_heads(files, tmp_path, capsys):
    assert cli.main(["info", str(files / "model"), "--heads", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "right        encoder.layer.0.attention.self, encoder.layer.1.attention.self\n" in printed
    assert "left whole" not in printed
    assert "--check: expected with --heads, got it without" in refusal(
        capsys, ["info", str(files / "model"), "--check"]
    )


def test_info_and_graph_of_experts(tmp_path, capsys):
    from transformers import OlmoeConfig

    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, architectures=["OlmoeModel"]).save_pretrained(tmp_path)
    assert cli.main(["info", str(tmp_path), "--experts"]) == 0
    printed = capsys.readouterr().out
    assert "L6 4" in printed and "L1+L6|L3|L4  L1+L6: 7" in printed
    assert cli.main(["graph", str(tmp_path), "--partition", "L1+L6|L3|L4", "-o", str(tmp_path / "graph.dot")]) == 0
    assert "expert.3" in (tmp_path / "graph.dot").read_text()
    # The heads of this model are not on their own.
    refused = refusal(capsys, ["info", str(tmp_path), "--heads"])
    assert "'layers.0.self_attn' (OlmoeAttention) is left whole: q_norm divides all heads by one norm" in refused
