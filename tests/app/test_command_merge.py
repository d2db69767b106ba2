"""`hsaid merge` as a command: what it prints, what it refuses, and what it leaves behind when it does not end well."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ENVIRONMENT
from models import IDS, bert, mlp, moved
from safetensors.torch import load_file, save_file
from test_cli import command, refusal

from hsaid_kernels import HSAID
from hsaid_kernels.app import cli, training
from hsaid_kernels.app.merge import tensor_files
from hsaid_kernels.app.merge.base import INDEX
from hsaid_kernels.app.merge.merge import Merging

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_bars():
    """Of transformers, on stderr, where models are loaded and saved here."""
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """What `hsaid train` leaves, whose head is in no file."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert cli.main(command(files, out, "--steps", "3")) == 0
    return out


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A folder with W0 in `base` and a checkpoint in `task`."""
    folder = tmp_path_factory.mktemp("by_hand")
    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(folder / "base")
    moved(HSAID(model, 150)).save_pretrained(folder / "task")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_of_train(files, trained, tmp_path, capsys):
    """The model is known, and its new head is initialized once more."""
    out = tmp_path / "deep" / "out"
    assert cli.main(["merge", str(trained), "-o", str(out)]) == 0
    said = capsys.readouterr()
    size = sum(path.stat().st_size for path in out.iterdir())
    assert said.out == f"merged       41 tensors, {size:,} bytes in {out}\n"
    assert said.err.startswith("merging: 41 of 41 tensors, ")
    classifier = training.load_trained(trained)
    classifier.model.merge().save_pretrained(tmp_path / "expected")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
    assert (out / "vocab.txt").read_bytes() == (files / "model" / "vocab.txt").read_bytes()

    texts = ["apple mango", "dog", "mouse cat"]
    pipeline = transformers.pipeline("text-classification", model=str(out), device="cpu")
    assert [answer["label"] for answer in pipeline(texts)] == classifier.predict(texts)
    shares = classifier.logits(texts).softmax(-1).max(-1).values
    assert torch.allclose(torch.tensor([answer["score"] for answer in pipeline(texts)]), shares, atol=1e-6)


def test_a_run_of_train_in_another_place(files, trained, tmp_path):
    """--model says where the model is now."""
    run = json.loads((trained / "training.json").read_text())
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "training.json").write_text(json.dumps(run | {"model": str(tmp_path / "gone")}))
    arguments = ["merge", str(tmp_path / "run"), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--model", str(files / "model")]) == 0


def test_threads_are_as_before(by_hand, tmp_path):
    before = torch.get_num_threads()
    arguments = ["--model", str(by_hand / "base"), "-o", str(tmp_path)]
    assert cli.main(["merge", str(by_hand / "task"), *arguments]) == 0
    assert torch.get_num_threads() == before


def merge(by_hand, out, *more: str, task="task", base="base") -> list[str]:
    return ["merge", str(by_hand / task), "--model", str(by_hand / base), "-o", str(out), *more]


@pytest.fixture
def copy(by_hand, tmp_path):
    """A copy of `by_hand`, to be spoilt."""
    shutil.copytree(by_hand, tmp_path / "copy")
    return tmp_path / "copy"


def refused(capsys, arguments, out) -> str:
    """The sentence; there is no output."""
    capsys.readouterr()
    message = refusal(capsys, arguments)
    assert not out.exists()
    return message


def test_another_w0(copy, tmp_path, capsys):
    path = copy / "base" / WEIGHTS
    tensors = load_file(path)
    tensors["bert.pooler.dense.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "model: expected the W0 from which " in message
    assert "got another one in 1 of 25 tensors ('bert.pooler.dense.weight'), so their weights would not be" in message


def test_another_w0_of_experts(tmp_path, capsys):
    """Only the whole tensor that the model makes of them tells."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=2))
    model.save_pretrained(tmp_path / "base")
    moved(HSAID(model, 150)).save_pretrained(tmp_path / "task")
    tensors = load_file(tmp_path / "base" / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if "experts.1" in name).add_(1)
    save_file(tensors, tmp_path / "base" / WEIGHTS, {"format": "pt"})
    message = refused(capsys, merge(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert "got another one in 1 of " in message and "mlp.experts.gate_up_proj" in message


def test_another_architecture(copy, tmp_path, capsys):
    config = json.loads((copy / "base" / "config.json").read_text())
    bert(hidden_size=32).save_pretrained(copy / "base")
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "model: expected W0 of all tensors in " in message and "got none of 'bert.embeddings.word_" in message
    assert config["hidden_size"] == 16


def test_a_new_head_that_was_projected(tmp_path, capsys):
    transformers.BertModel(bert().config).save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    moved(HSAID(model, 150)).save_pretrained(tmp_path / "task")
    message = refused(capsys, merge(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert "got none of 'classifier.weight', 'classifier.bias', which were initialized for training: train" in message
    assert "train_fully=" in message
    # The remedy: the model as it was.
    model.save_pretrained(tmp_path / "base")
    assert cli.main(merge(tmp_path, tmp_path / "out")) == 0


def test_adapters_of_peft(copy, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    model.save_pretrained(copy / "lora")
    message = refused(capsys, merge(copy, tmp_path / "out", task="lora"), tmp_path / "out")
    assert "directory: expected a checkpoint of an HSAID, got an adapter of peft in " in message
    assert "merge_and_unload()" in message


def test_no_checkpoint(copy, tmp_path, capsys):
    for task, words in (("base", "truncated or foreign"), ("none", "got no file"), ("base/config.json", "got no file")):
        assert words in refused(capsys, merge(copy, tmp_path / "out", task=task), tmp_path / "out")


def test_a_base_without_safetensors(copy, tmp_path, capsys):
    base = copy / "base"
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert f"expected a folder with {WEIGHTS} or {INDEX}, got one with pytorch_model.bin" in message
    assert "save_pretrained()" in message
    (base / "pytorch_model.bin").unlink()
    assert "got one without: " in refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "got 'nowhere'" in refused(capsys, merge(copy, tmp_path / "out", "--model", "nowhere"), tmp_path / "out")


def in_shards(folder) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")


def test_a_shard_that_is_missing(copy, tmp_path, capsys):
    in_shards(copy / "base")
    second = sorted((copy / "base").glob("*.safetensors"))[1]
    second.unlink()
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    count = len(set(json.loads((copy / "base" / INDEX).read_text())["weight_map"].values()))
    assert f"model: expected the {count} files that {INDEX} names, got a folder " in message
    assert f"without {second.name}: copy or download" in message


def test_a_shard_that_is_truncated(copy, tmp_path, capsys):
    in_shards(copy / "base")
    second = sorted((copy / "base").glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-1])
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "model: expected a whole safetensors file, got " in message and second.name in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_damaged_index(text, copy, tmp_path, capsys):
    in_shards(copy / "base")
    (copy / "base" / INDEX).write_text(text)
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "model: expected an index of files, got a damaged " in message


def test_a_quantized_base(copy, tmp_path, capsys):
    path = copy / "base" / WEIGHTS
    tensors = load_file(path)
    tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"].to(torch.int8)
    save_file(tensors, path, {"format": "pt"})
    message = refused(capsys, merge(copy, tmp_path / "out"), tmp_path / "out")
    assert "model: expected trained tensors in F32, BF16, F16, got 'bert.pooler.dense.weight' in I8" in message


def test_no_model_of_transformers(tmp_path, capsys):
    moved(HSAID(mlp(), 24)).save_pretrained(tmp_path / "task")
    bert().save_pretrained(tmp_path / "base")
    message = refused(capsys, merge(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert "model: expected the one that was trained, got " in message
    assert "no class of which has its tensors" in message

    class Own(transformers.BertForSequenceClassification):
        pass

    moved(HSAID(Own(bert().config), 150)).save_pretrained(tmp_path / "task")
    message = refused(capsys, merge(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert "got one of a Own: merge it by HSAID.from_pretrained(directory, model).merge()" in message


def test_a_model_that_must_be_named(by_hand, tmp_path, capsys):
    message = refused(capsys, ["merge", str(by_hand / "task"), "-o", str(tmp_path / "out")], tmp_path / "out")
    assert f"--model: expected the one that {str(by_hand / 'task')!r} was trained from, as it does not say" in message


def test_where_the_output_cannot_be(copy, tmp_path, capsys):
    before = contents(copy)
    for place in ("base", "task", "../copy/base"):
        message = refusal(capsys, merge(copy, copy / place))
        assert "-o: expected another directory than the model's and the checkpoint's" in message
    (copy / "file").write_text("x")
    for place in ("file", "file/deep"):
        assert "-o: expected a directory that can be written to, got " in refusal(capsys, merge(copy, copy / place))
    (copy / "file").unlink()
    assert contents(copy) == before
    message = refusal(capsys, ["merge", str(copy / "task"), "--model", str(copy / "base")])
    assert "-o: expected a directory to write to, or --to hub:NAME, got neither" in message


def test_a_dtype_that_is_too_small(copy, tmp_path, capsys):
    model = transformers.BertForSequenceClassification.from_pretrained(copy / "base")
    with torch.no_grad():
        model.bert.pooler.dense.bias[3] = 1e6
    model.save_pretrained(copy / "base")
    HSAID(model, 150).save_pretrained(copy / "task")
    message = refused(capsys, merge(copy, tmp_path / "out", "--dtype", "float16"), tmp_path / "out")
    assert "dtype: expected one that holds all weights, got torch.float16" in message
    assert "'bert.pooler.dense.bias' has 1000000" in message
    assert cli.main(merge(copy, tmp_path / "out", "--dtype", "bfloat16")) == 0


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        ({"seed": 1}, "expected seed 0, as in this HSAID, got 1"),
        ({"intrinsic_dim": 151}, "expected intrinsic_dim 150, as in this HSAID, got 151"),
        ({"exclude": "pooler"}, "expected the 23 tensors that were trained, got others: 'bert.pooler"),
        ({"dtype": torch.bfloat16}, "expected the dtype of "),
    ],
)
def test_tasks_that_do_not_fit_together(wrap, message, copy, tmp_path, capsys):
    model = transformers.BertForSequenceClassification.from_pretrained(copy / "base")
    moved(HSAID(model, **{"intrinsic_dim": 150} | wrap)).save_pretrained(copy / "other")
    arguments = merge(copy, tmp_path / "out", str(copy / "other"), "--weights", "0.5", "0.5")
    arguments = ["merge", str(copy / "task"), str(copy / "other"), *arguments[2:6], "--weights", "0.5", "0.5"]
    assert message in refused(capsys, arguments, tmp_path / "out")


def test_tasks_of_another_w0_or_other_labels(copy, tmp_path, capsys):
    arguments = ["merge", str(copy / "task"), str(copy / "other"), *merge(copy, tmp_path / "out")[2:]]
    arguments += ["--weights", "0.5", "0.5"]
    torch.manual_seed(1)
    moved(HSAID(bert(), 150)).save_pretrained(copy / "other")
    assert "got one that was trained from another" in refused(capsys, arguments, tmp_path / "out")
    model = transformers.BertForSequenceClassification.from_pretrained(copy / "base", id2label={0: "x", 1: "y"})
    moved(HSAID(model, 150)).save_pretrained(copy / "other")
    assert "expected the labels of " in refused(capsys, arguments, tmp_path / "out")


def test_weights_that_do_not_fit(by_hand, tmp_path, capsys):
    two = ["merge", str(by_hand / "task"), str(by_hand / "task"), *merge(by_hand, tmp_path / "out")[2:]]
    for more, got in (([], "none"), (["--weights", "1"], "1"), (["--weights", "1", "1", "1"], "3")):
        message = refused(capsys, [*two, *more], tmp_path / "out")
        assert f"--weights: expected one for each of 2 checkpoints, got {got}" in message
    assert "--weights: expected a number, got 'nan'" in refused(capsys, [*two, "--weights", "nan"], tmp_path / "out")


# --- what does not end well


@pytest.mark.parametrize("pieces", [0, 1, 8, 24])
def test_a_disk_that_fills_up(pieces, copy, tmp_path, capsys, monkeypatch):
    """One sentence, and the output of before is there, or none."""
    assert cli.main(merge(copy, tmp_path / "old")) == 0
    before = contents(tmp_path / "old")
    capsys.readouterr()
    moved(HSAID(transformers.BertForSequenceClassification.from_pretrained(copy / "base"), 60)).save_pretrained(
        copy / "task"
    )
    right, written = os.pwrite, []

    def full(handle, data, at):
        written.append(at)
        if len(written) > pieces:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(handle, data, at)

    monkeypatch.setattr(tensor_files.os, "pwrite", full)
    for out in (tmp_path / "old", tmp_path / "new" / "deep"):
        written.clear()
        message = refusal(capsys, merge(copy, out))
        expected = f"-o: expected a directory that can be written to, got {str(out)!r}: No space left on device"
        assert message.endswith(expected)
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


SLOW = """
import os, sys, time
from hsaid_kernels.app import cli
from hsaid_kernels.app.merge import tensor_files
right, done = os.pwrite, []
def slow(handle, data, at):
    done.append(at)
    if len(done) == 9:
        print("here", flush=True)
        time.sleep(60)
    return right(handle, data, at)
tensor_files.os.pwrite = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_merge_that_is_killed(end, copy, tmp_path):
    """The output of before stays whole, and the next merge starts from the beginning."""
    out = tmp_path / "out"
    assert cli.main(merge(copy, out)) == 0
    before = contents(out)
    moved(HSAID(transformers.BertForSequenceClassification.from_pretrained(copy / "base"), 60)).save_pretrained(
        copy / "task"
    )
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *merge(copy, out)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(end)
    assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == before
    assert cli.main(merge(copy, out)) == 0
    after = contents(out)
    assert after.keys() == before.keys() and after[WEIGHTS] != before[WEIGHTS]
    assert cli.main(merge(copy, tmp_path / "fresh")) == 0
    assert after == contents(tmp_path / "fresh")


def test_an_interrupted_merge(copy, tmp_path, capsys, monkeypatch):
    right, done = Merging._write, []

    def interrupt(*arguments):
        done.append(arguments)
        if len(done) == 9:
            raise KeyboardInterrupt
        right(*arguments)

    monkeypatch.setattr(Merging, "_write", interrupt)
    capsys.readouterr()
    assert cli.main(merge(copy, tmp_path / "out")) == 130
    assert capsys.readouterr().err.endswith("hsaid: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_runs(by_hand, tmp_path):
    """The smallest use, as in the documentation."""
    assert cli.main(merge(by_hand, tmp_path / "out")) == 0
    model = transformers.BertForSequenceClassification.from_pretrained(by_hand / "base")
    hsaid = HSAID.from_pretrained(by_hand / "task", model).eval()
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(merged(IDS).logits, hsaid(IDS).logits)
