"""The examples, run as users run them, on a random BERT of two layers: what they say and leave behind, how they go on
after a kill -9, and two processes. measure_mnist.py: on files of invented digits.
"""

import gzip
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from models import same
from safetensors.torch import load_file
from words import ANIMALS, FRUIT

from hsaid_kernels.wrapper.checkpoint.files import last_checkpoint
from hsaid_kernels.wrapper.hsaid import HSAID

for needed in ("transformers", "accelerate", "datasets", "babel"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSIFICATION, CUSTOM, SHARDED, MULTI, PRUNE, MNIST = (
    EXAMPLES / f"{name}.py"
    for name in ("text_classification", "custom_loop", "sharded", "multi_task", "prune_heads", "measure_mnist")
)
SECONDS = 120  # a run takes ten, but the machine may be busy
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")  # standalone: at a free port
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")

# Kills itself when half of the n-th file by torch.save is on the disk.
DYING = """
import io, os, runpy, signal, sys, torch
script, n, *sys.argv[1:] = sys.argv[1:]
save, calls = torch.save, []

def dying(value, file, *args, **kwargs):
    calls.append(file)
    if len(calls) < int(n):
        return save(value, file, *args, **kwargs)
    data = io.BytesIO()
    save(value, data)
    with file if hasattr(file, "write") else open(file, "wb") as half:
        half.write(data.getvalue()[: data.tell() // 2])
        half.flush()
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = dying
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""

# What main() returns is an HSAID or a Trainer of one. Each process leaves the values that it ends with.
RANKS = """
import importlib, os, sys, torch, transformers
out, folder, name, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
result = importlib.import_module(name).main(arguments)
hsaid = result.model if isinstance(result, transformers.Trainer) else result
torch.save(dict(hsaid.named_parameters()), os.path.join(out, f"{os.environ['RANK']}.pt"))
"""

# As RANKS, and each process leaves how many bytes of the model's files it has read.
READS = """
import contextlib, importlib, os, sys, safetensors, torch
import transformers.modeling_utils  # which keeps a safe_open of its own
out, folder, name, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
module = importlib.import_module(name)
load, safe_open, read = module.load_sharded, safetensors.safe_open, []

class Slice:
    def __init__(self, slice):
        self.slice, self.get_shape, self.get_dtype = slice, slice.get_shape, slice.get_dtype

    def __getitem__(self, index):
        tensor = self.slice[index]
        read.append(tensor.nbytes)
        return tensor

class File:  # has no get_tensor()
    def __init__(self, file):
        self.file, self.keys, self.metadata = file, file.keys, file.metadata

    def get_slice(self, key):
        return Slice(self.file.get_slice(key))

@contextlib.contextmanager
def counting(*args, **kwargs):
    with safe_open(*args, **kwargs) as file:
        yield File(file)

def load_counted(*args):
    safetensors.safe_open = counting
    try:
        return load(*args)
    finally:
        safetensors.safe_open = safe_open

module.load_sharded = load_counted
hsaid = module.main(arguments)
values = dict(hsaid.named_parameters())
torch.save(values, os.path.join(out, f"{os.environ['RANK']}.pt"))
print(f"read by rank {os.environ['RANK']}: {sum(read)} bytes", flush=True)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two random BERTs with their vocabulary, "model" and, without dropout, "still"; two files of data."""
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("files")
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *FRUIT, *ANIMALS]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, dropout in {"model": 0.1, "still": 0.0}.items():
        # Larger weights and less dropout than BERT's, so that so small a model learns.
        random = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": dropout}
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocabulary), **sizes, **random)).save_pretrained(directory / name)
        (directory / name / "vocab.txt").write_text("\n".join(vocabulary))
        (directory / name / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    words = {"fruit": FRUIT, "animal": ANIMALS}
    rows = [f"{' '.join(two)},{label}\n" for label in words for two in itertools.permutations(words[label], 2)]
    for name, chosen in (("train", rows[::2]), ("test", rows[1::2])):
        (directory / f"{name}.csv").write_text("text,label\n" + "".join(chosen))
    return directory


@pytest.fixture(scope="module")
def run(files):
    """Runs Python with these arguments, to its end or until it is time to kill it; returns what it printed."""
    # A thread for each process, of which there may be two; no hub, and nothing in the user's caches.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(files / "cache")}

    def run(*arguments, until=None, code=0):
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            end = time.monotonic() + SECONDS
            while until is not None and process.poll() is None and time.monotonic() < end:
                if until():
                    process.kill()
                time.sleep(0.0002)
            said, _ = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        assert process.returncode == code, said
        return said

    return run


@pytest.fixture
def example(monkeypatch):
    """An example as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda path: importlib.import_module(path.stem)


def size(out):
    return (out / "hsaid.safetensors").stat().st_size


def values(out):
    return load_file(out / "hsaid.safetensors")


def accuracy(said):
    return float(re.search(r"accuracy (\d\.\d+) on", said)[1])


def check_quiet(said):
    """No warnings: a newcomer cannot know which ones do not matter."""
    assert not re.search(r"warn|deprecat|\[transformers\]", said, re.IGNORECASE), said


def by_rank(pattern, said):
    """The figures of each rank, in the order of the ranks: the processes print when they are ready."""
    found = {int(rank): int(figure.replace(",", "")) for rank, figure in re.findall(pattern, said)}
    return [found[rank] for rank in sorted(found)]


def check_ranks(out):
    first, second = (torch.load(out / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["theta"].norm() > 0


def classify(files, out, *more, model="model"):
    settings = {"intrinsic_dim": 300, "max_steps": 80, "seed": 0}
    paths = {"model": files / model, "output_dir": out}
    return [f"--{name}={value}" for name, value in (settings | paths).items()] + [*more]


def fruit(files):
    return [
        f"--train_file={files / 'train.csv'}",
        f"--test_file={files / 'test.csv'}",
        "--per_device_train_batch_size=5",
    ]


@pytest.fixture(scope="module")
def classified(run, files, tmp_path_factory):
    """A run of text_classification.py that nobody interrupts, and what it printed."""
    out = tmp_path_factory.mktemp("classified")
    return out, run(CLASSIFICATION, *classify(files, out, *fruit(files), "--save_steps=20"))


def test_text_classification_learns_and_reloads(files, classified, example):
    out, said = classified
    check_quiet(said)
    assert accuracy(said) > 0.8
    assert f"on 30 texts; {size(out):,} bytes in {out}" in said
    assert size(out) < 4096
    labels = ["animal", "fruit"]
    predicted = []
    for directory in (out, out / "checkpoint-80"):  # ours, and the last of Trainer's
        model, tokenizer = example(CLASSIFICATION).load_model(files / "model", labels, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hsaid = HSAID.from_pretrained(directory, model).eval()
        lines = [line.split(",") for line in (files / "test.csv").read_text().split("\n")[1:-1]]
        with torch.no_grad():
            tokens = tokenizer([text for text, _ in lines], padding=True, return_tensors="pt")
            predicted.append(hsaid(**tokens).logits)
    assert torch.equal(*predicted)
    right = [labels[i] == label for i, (_, label) in zip(predicted[0].argmax(-1).tolist(), lines)]
    assert sum(right) / len(right) == pytest.approx(accuracy(said), abs=5e-5)


def test_text_classification_goes_on_after_kills(run, files, classified, tmp_path):
    arguments = classify(files, tmp_path, *fruit(files), "--save_steps=20", "--resume")
    # torch.save makes training_args.bin, optimizer.pt, scheduler.pt, rng_state.pth: this is the second's optimizer.pt.
    run("-c", DYING, CLASSIFICATION, 6, *arguments, code=-signal.SIGKILL)
    assert (tmp_path / "checkpoint-40" / "optimizer.pt").exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    run(CLASSIFICATION, *arguments, until=(tmp_path / "checkpoint-60").exists, code=-signal.SIGKILL)
    assert last_checkpoint(tmp_path) in [str(tmp_path / f"checkpoint-{step}") for step in (40, 60)]
    said = run(CLASSIFICATION, *arguments)
    assert "'epoch': '12.5'" in said  # what a checkpoint remembers of step 75
    assert not re.search("'loss'.*'epoch': '4.167'", said)  # step 25 is not done again
    assert same(values(tmp_path), values(classified[0]))


def test_text_classification_in_two_processes(run, files, tmp_path):
    """They compute what one does on batches of twice the size. On the embedded names."""
    (tmp_path / "ranks.py").write_text(RANKS)
    losses = []
    for size, launcher, out in ((4, [*TORCHRUN, tmp_path / "ranks.py", tmp_path, EXAMPLES], "two"), (8, [], "one")):
        script = CLASSIFICATION.stem if launcher else CLASSIFICATION
        settings = ["--max_steps=10", "--logging_steps=1", "--save_steps=10", f"--per_device_train_batch_size={size}"]
        said = run(*launcher, script, *classify(files, tmp_path / out, *settings, model="still"))
        check_quiet(said)
        state = json.loads((tmp_path / out / "checkpoint-10" / "trainer_state.json").read_text())
        losses.append([row["loss"] for row in state["log_history"] if "loss" in row])
    check_ranks(tmp_path)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "a.csv"}, "--test_file: expected one beside --train_file a.csv, got none"),
        (
            {"train_file": "a.tsv", "test_file": "b.csv"},
            "--train_file: expected a name ending in .csv, .json, .jsonl, got 'a.tsv'",
        ),
    ],
)
def test_text_classification_says_what_is_wrong_with_files(example, options, message):
    text_classification = example(CLASSIFICATION)
    with pytest.raises(SystemExit, match=message):
        text_classification.load_data(text_classification.Options(**options))


def test_text_classification_says_what_is_wrong_with_data(example, monkeypatch):
    import datasets

    module = example(CLASSIFICATION)
    named = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def load(train, test, features=named, **options):
        parts = {"train": train, "test": test}
        data = {name: {"text": ["a"] * len(labels), "label": labels} for name, labels in parts.items()}
        split = {name: datasets.Dataset.from_dict(part, features) for name, part in data.items()}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(split))
        return module.load_data(module.Options(dataset="any", **options))

    assert load([0, 1], [1]) == ([("a", "no"), ("a", "yes")], [("a", "yes")])
    assert load([0, 5], [5], features=None) == ([("a", "0"), ("a", "5")], [("a", "5")])
    with pytest.raises(SystemExit, match="--test_split: expected the labels of training, got also -1"):
        load([0, 1], [-1])  # as the test parts of some benchmarks have it
    with pytest.raises(SystemExit, match="--test_split: expected one of train, test, got 'dev'"):
        load([0, 1], [1], test_split="dev")
    with pytest.raises(SystemExit, match="--text_column: expected one of text, label, got 'sentence'"):
        load([0, 1], [1], text_column="sentence")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        module.load_data(module.Options(dataset="any"))


def loop(files, out, *more, model="model"):
    settings = {"intrinsic-dim": 300, "per-label": 10, "steps": 40, "batch-size": 8}
    paths = {"model": files / model, "out": out}
    return [f"--{name}={value}" for name, value in (settings | paths).items()] + [*more]


def test_custom_loop_goes_on_after_kills(run, files, tmp_path):
    """At any moment, also while it saves, it can be killed: that changes no bit of what it ends with."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    settings = ["--save-every=1", "--steps=150"]
    said = run(CUSTOM, *loop(files, whole, *settings))
    check_quiet(said)
    assert f"{size(whole):,} bytes in {whole}" in said
    checkpoint, unfinished = out / "checkpoint.pt", out / "checkpoint.tmp"
    run("-c", DYING, CUSTOM, 3, *loop(files, out, *settings), code=-signal.SIGKILL)
    assert torch.load(checkpoint)["step"] == 2
    assert unfinished.exists()
    before = checkpoint.stat().st_mtime_ns
    saved = lambda: checkpoint.stat().st_mtime_ns != before and unfinished.exists()  # noqa: E731
    said = run(CUSTOM, *loop(files, out, *settings, "--resume"), until=saved, code=-signal.SIGKILL)
    assert "going on after step 2\n" in said
    step = torch.load(checkpoint)["step"]
    assert 2 < step < 150
    said = run(CUSTOM, *loop(files, out, *settings, "--resume"))
    assert f"going on after step {step}\n" in said
    assert same(values(out), values(whole))


def test_custom_loop_in_two_processes(run, files, tmp_path):
    """They compute what one does on batches of twice the size."""
    (tmp_path / "ranks.py").write_text(RANKS)
    settings = ["--log-every=1", "--steps=10"]
    launcher = [*TORCHRUN, tmp_path / "ranks.py", tmp_path, EXAMPLES, CUSTOM.stem]
    two = run(*launcher, *loop(files, tmp_path, *settings, model="still"))
    one = run(CUSTOM, *loop(files, tmp_path, *settings, "--batch-size=16", model="still"))
    check_ranks(tmp_path)
    losses = [[float(loss) for loss in re.findall(r"step +\d+ +loss (\d\.\d+)", said)] for said in (two, one)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert accuracy(two) == pytest.approx(accuracy(one), abs=0.03)


def test_custom_loop_compiled_in_bfloat16_on_the_embedded_model(run, tmp_path):
    settings = ["--bf16", "--compile=eager", "--steps=2", "--per-label=4", "--batch-size=4", "--log-every=1"]
    said = run(CUSTOM, *settings, f"--out={tmp_path}")
    check_quiet(said)
    assert "HSAID(Classifier, 105 tensors, " in said
    assert len(re.findall(r"step +\d+ +loss [12]\.\d+", said)) == 2


def test_sharded_in_two_processes(run, files, tmp_path):
    """They compute what one does on batches of twice the size, and none of them reads or holds more than its shards."""
    (tmp_path / "reads.py").write_text(READS)
    settings = ["--log-every=1", "--steps=10", "--check"]
    launcher = [*TORCHRUN, tmp_path / "reads.py", tmp_path, EXAMPLES, SHARDED.stem]
    two = run(*launcher, *loop(files, tmp_path / "two", *settings, model="still"))
    one = run(SHARDED, *loop(files, tmp_path / "one", *settings, "--batch-size=16", model="still"))
    for said in (two, one):
        check_quiet(said)
        assert "logits of a model in one piece differ by 0.0e+00 at most\n" in said
    check_ranks(tmp_path)
    losses = [[float(loss) for loss in re.findall(r"step +\d+ +loss (\d\.\d+)", said)] for said in (two, one)]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert accuracy(two) == pytest.approx(accuracy(one), abs=0.03)
    assert size(tmp_path / "two") == size(tmp_path / "one") < 7000

    whole = load_file(files / "still" / "model.safetensors")
    held = by_rank(r"rank (\d): ([\d,]+) bytes of W0", two)
    assert by_rank(r"read by rank (\d): (\d+) bytes", two) == held
    assert sum(held) == sum(tensor.nbytes for tensor in whole.values())
    rows = sum(tensor[0].nbytes for tensor in whole.values())  # where their number is odd
    assert abs(held[0] - held[1]) <= rows < held[0] / 4


def test_sharded_in_bfloat16_with_rotary_positions(run, files, tmp_path):
    """From several files, on which the buffers of a Llama are not."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    vocabulary = len((files / "still" / "vocab.txt").read_text().split("\n"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes)
    LlamaModel(config).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(files / "still" / name, tmp_path / "model")
    settings = ["--log-every=1", "--steps=3", "--check", "--dtype=bfloat16"]
    said = run(*TORCHRUN, SHARDED, *loop(tmp_path, tmp_path / "out", *settings))
    check_quiet(said)
    assert len(re.findall(r"step +\d+ +loss [12]\.\d+", said)) == 3
    assert "logits of a model in one piece differ by 0.0e+00 at most\n" in said


def test_multi_task_in_two_processes(run, files, tmp_path, example):
    settings = ["--intrinsic-dim=300", "--steps=20", "--per-label=20", "--batch-size=8", "--log-every=10"]
    said = run(*ACCELERATE, MULTI, f"--model={files / 'model'}", f"--out={tmp_path}", *settings)
    rows = re.findall(r"^(\w+) +(0\.\d{4}) +(0\.\d{4}) +(0\.\d{4}) +([\d,]+)$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["kind", "family", "language"]
    for task, trained, *others, told in rows:
        assert others == [trained] * 2
        assert int(told.replace(",", "")) == size(tmp_path / task) < 6000
    thetas = [values(tmp_path / row[0])["theta"] for row in rows]
    assert all(theta.any() for theta in thetas) and not torch.equal(thetas[0], thetas[1])


# --- heads


def test_pruned_heads(files, example, tmp_path, capsys):
    arguments = ["--model", files / "still", "--amount", "1", "--intrinsic-dim", "300", "--batch-size", "16"]
    small = ["--steps", "3", "--log-every", "1", "--per-label", "4", "--examples", "2", "--out", tmp_path]
    example(PRUNE).main(list(map(str, arguments + small)))
    said = capsys.readouterr().out
    pruned = re.findall(r"pruned bert.encoder.layer.(\d).attention.self: heads (\d)\n", said)
    assert [layer for layer, _ in pruned] == ["0", "1"]
    for layer, head in pruned:
        values = re.search(rf"layer.{layer}.attention.self +(\S+) +(\S+)\n", said).groups()
        assert [value == "-" for value in values] == [head == "0", head == "1"]
    masked, taken_out = (
        re.search(rf"{what} +([\d,]+) .* ([\d.]+)\n", said).groups() for what in ("masked", "taken out")
    )
    assert int(masked[0].replace(",", "")) - int(taken_out[0].replace(",", "")) == 2 * (4 * 16 * 32 + 3 * 16)
    assert masked[1] == taken_out[1]
    assert float(re.search(r"logits differ by (\S+) at most", said).group(1)) < 1e-4
    assert (tmp_path / "hsaid.safetensors").exists()


# --- measure_mnist.py


def write_idx(path, values):
    """`values`: a tensor of bytes."""
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    data = header + values.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Ten digits that are easy to tell apart, as idx files: those for training gzipped."""
    folder = tmp_path_factory.mktemp("digits")
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(10, 28, 28, generator=generator) < 0.2
    for part, ending, count in (("train", ".gz", 1500), ("t10k", "", 500)):
        labels = torch.randint(10, (count,), generator=generator)
        images = 200 * shapes[labels] + torch.randint(50, (count, 28, 28), generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images.to(torch.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels.to(torch.uint8))
    return folder


def test_measure_mnist(run, digits, tmp_path):
    pytest.importorskip("optuna")
    sizes = ["--seeds=1", "--refine=0", "--epochs=1", "--held-out=300", f"--out={tmp_path}", "--threads=1"]
    command = [MNIST, digits, "--dims", 5, 200, "--dense", 5, "--compare", "gpart:5", *sizes]
    said = run(*command)
    check_quiet(said)
    found = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in os.listdir(tmp_path)}
    assert sorted(found) == ["fc", "fc-dense", "lenet", "lenet-dense"]
    for name, results in found.items():
        weights = "199,210" if name.startswith("fc") else "44,426"
        assert results["settings"]["tensors"].endswith(f" tensors, {weights} weights")
        assert results["runs_left"] == 0
        assert f"published d90 {750 if name.startswith('fc') else 290}\n" in said
        assert (tmp_path / name / "dimension.png").stat().st_size > 10_000
        scores = [point["runs"][0]["test"] for point in results["points"]]
        assert [point["d"] for point in results["points"]] == ([None, 5] if "dense" in name else [None, 5, 200, None])
        assert scores[0] > 0.5 and scores[0] > scores[1] > 0.1
    points = [found[name]["points"] for name in ("fc", "fc-dense")]
    assert points[0][0]["runs"][0]["test"] == points[1][0]["runs"][0]["test"]  # the same baseline
    assert points[0][1]["runs"][0]["test"] != points[1][1]["runs"][0]["test"]  # another matrix
    again = run(*command)  # nothing is left to do
    assert re.findall(r"^\|.*", again, re.MULTILINE) == re.findall(r"^\|.*", said, re.MULTILINE)


def test_measure_mnist_bounds(example, digits):
    """All images are trained on, and the rate is chosen by the bound."""
    pytest.importorskip("optuna")
    pytest.importorskip("constriction")
    module = example(MNIST)
    args = module.parse([str(digits), "--bits", "3"])
    training = module.Training(str(digits), args.held_out, "lenet", "he", 1, False, args.bits)
    assert training.settings["bits"] == 3 and training.settings["images"]["train"].startswith("1,500 (")
    scores = training(module.Run("did", 100, 0.3, 0))
    found = module.Certificate(round(scores.train_error * 1500), scores.examples, scores.bits)
    assert scores.examples == 1500 and scores.bits < 3 * 100 + 60
    assert scores.validation == 1 - found.bound and found.training_error < found.bound < 1
    assert "bits" not in module.Training(str(digits), 300, "lenet", "he", 1, False).settings


def test_measure_mnist_dense_matrix(example):
    module = example(MNIST)
    model = module.network("lenet", "he", seed=0)
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        before = model(images)
        dense = module.DenseSubspace(model, 300, seed=0)
        assert torch.equal(dense(images), before)
        dense.theta.normal_()
        assert not torch.equal(dense(images), before)
        assert torch.equal(model(images), before)
        assert (dense.basis @ dense.theta).norm() / dense.theta.norm() == pytest.approx(1, abs=0.02)
    assert [name for name, weight in dense.named_parameters() if weight.requires_grad] == ["theta"]
    assert module.dense_dims("fc", [100, 750, 1500], 1.0, all_must_fit=False) == [100, 750]
    with pytest.raises(SystemExit, match=r"--dense: expected .* at most 1 GB \(--memory\), got d = 1,500, with 1.2 GB"):
        module.dense_dims("fc", [100, 750, 1500], 1.0, all_must_fit=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda images, labels: labels.unlink(), "expected the file train-labels-idx1-ubyte or .*.gz, got neither"),
        (
            lambda images, labels: images.write_bytes(images.read_bytes()[:1000]),
            "train-images-idx3-ubyte.gz: expected a file that can be read, got: Compressed file ended",
        ),
        (
            lambda images, labels: images.write_bytes(b"<html>"),
            "train-images-idx3-ubyte.gz: expected a file that can be read, got: Not a gzipped file",
        ),
        (
            lambda images, labels: labels.write_bytes(images.read_bytes()),
            "train-labels-idx1-ubyte.gz: expected a 1-dimensional idx file of bytes, which begins with 00 00 08 01, "
            "got 00 00 08 03 in 1,176,016 bytes",
        ),
        (
            lambda images, labels: images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1])),
            "train-images-idx3-ubyte.gz: expected 1,500 x 28 x 28 values as it says itself, got 1,175,999",
        ),
        (
            lambda images, labels: write_idx(labels, torch.zeros(1400, dtype=torch.uint8)),
            "train-labels-idx1-ubyte.gz: expected a label for each of 1,500 images, got 1,400",
        ),
        (
            lambda images, labels: write_idx(labels, torch.full((1500,), 10, dtype=torch.uint8)),
            "train-labels-idx1-ubyte.gz: expected labels from 0 to 9, got 10",
        ),
        (
            lambda images, labels: write_idx(images, torch.zeros(1500, 32, 32, dtype=torch.uint8)),
            "train-images-idx3-ubyte.gz: expected images of 28 x 28 pixels, got 1,500 x 32 x 32",
        ),
    ],
)
def test_measure_mnist_says_what_is_wrong_with_files(example, digits, tmp_path, damage, message):
    pytest.importorskip("optuna")
    folder = shutil.copytree(digits, tmp_path / "digits")
    damage(folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz")
    with pytest.raises(SystemExit, match=message):
        example(MNIST).main([str(folder), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
