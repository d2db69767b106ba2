"""Damaged checkpoints and senseless arguments, many hundred of them: every command ends well or in one sentence.

What is planted is drawn with fixed seeds, so that a case that fails fails again. An exception that leaves `cli.main`, a
traceback or a second line on stderr is a fault, and so is a checkpoint that is loaded although its values are not those
that were saved.
"""

import json
import os
import random
import shutil

import pytest
import safetensors.torch
import torch
from models import bert

from hsaid_kernels.app import cli
from hsaid_kernels.app.trained import RUN_FILE, described
from hsaid_kernels.wrapper.checkpoint.configuration import packed
from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE, _digest
from hsaid_kernels.wrapper.hsaid import HSAID

FILES = (VALUES_FILE, CONFIG_FILE, RUN_FILE)
WRONG = [
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1.5,
    float("nan"),
    "",
    "x",
    "\u0000",
    "hsaid-3",
    [],
    [1],
    ["x"],
    [[]],
    {},
    {"x": 1},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory as `hsaid train` leaves it."""
    directory = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(directory.with_name("base"))
    hsaid = HSAID(model, 40)
    with torch.no_grad():
        hsaid.theta.normal_()
    hsaid.save_pretrained(directory)
    run = {"model": str(directory / "nowhere"), "seed": 0, "labels": ["a", "b"], "max_length": 8, "steps": 1}
    run["components"] = described(hsaid.partition)
    (directory / RUN_FILE).write_text(json.dumps(run))
    return directory


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(whole, copy)
    return copy


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def said(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code and what was printed, if it is what may be said; anything else fails."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as end:  # --help, --version
        code = end.code
    out, err = capsys.readouterr()
    assert code in (0, 2), (code, err)
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("merging:"))  # progress
    if code:
        assert err.startswith("hsaid: ") and err.count("\n") == 1 and len(err) < 2000, err
        assert "Traceback" not in err
    return code, out + err


@pytest.mark.parametrize("file", FILES)
@pytest.mark.filterwarnings("ignore:directory")
def test_truncated(file, damaged, capsys):
    data = (damaged / file).read_bytes()
    for length in sorted({*range(20), *range(0, len(data), max(1, len(data) // 25)), len(data) - 1}):
        (damaged / file).write_bytes(data[:length])
        code, text = said(capsys, "info", str(damaged))
        if file == VALUES_FILE:
            assert code == 2 and "directory: expected" in text, length


@pytest.mark.parametrize("file", FILES)
@pytest.mark.filterwarnings("ignore:directory")
def test_flipped_bits(file, damaged, capsys):
    data = (damaged / file).read_bytes()
    draw = random.Random(file)
    for _ in range(60):
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        (damaged / file).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        code, text = said(capsys, "info", str(damaged))
        if file == VALUES_FILE:
            assert code == 2, (at, bit, text)


def rewrite(directory, change) -> None:
    """The checkpoint with another configuration, whole as far as its digest says."""
    data = (directory / VALUES_FILE).read_bytes()
    values = safetensors.torch.load(data)
    config = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["config"]
    text = json.dumps(change(json.loads(config)))
    saved = safetensors.torch.save(values, {"config": text, "digest": _digest(text, values)})
    (directory / VALUES_FILE).write_bytes(saved)


def keys() -> list[str]:

    return sorted([*packed(HSAID(bert(), 40).configuration()), "architecture"])


@pytest.mark.parametrize("key", keys())
@pytest.mark.filterwarnings("ignore:directory")
def test_configurations_of_other_versions(key, whole, tmp_path, capsys):
    """A value of another kind in the place of each, and none at all."""
    base = whole.with_name("base")
    for number, wrong in enumerate([..., *WRONG]):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)

        def change(config, wrong=wrong):
            if wrong is ...:
                config.pop(key)
            else:
                config[key] = wrong
            return config

        rewrite(directory, change)
        said(capsys, "info", str(directory))
        said(capsys, "graph", str(directory), "-o", str(directory / "graph.dot"))
        said(capsys, "merge", str(directory), "--model", str(base), "-o", str(directory / "merged"))
        try:
            HSAID.from_pretrained(directory, bert())
        except (ValueError, TypeError) as error:
            assert "expected" in str(error) or str(error).startswith(key), error
        else:
            assert key not in ("format", "generator")


@pytest.mark.parametrize("key", ["model", "seed", "labels", "max_length", "components", "steps"])
def test_runs_with_other_values(key, damaged, capsys):
    run = json.loads((damaged / RUN_FILE).read_text())
    for wrong in WRONG:
        (damaged / RUN_FILE).write_text(json.dumps(run | {key: wrong}))
        said(capsys, "info", str(damaged))
        said(capsys, "graph", str(damaged), "-o", str(damaged / "graph.dot"))
        said(capsys, "merge", str(damaged), "-o", str(damaged / "merged"))
        said(capsys, "predict", str(damaged), "--data", __file__)


@pytest.mark.parametrize("damage", ["no components", "a path less", "a path more", "text as levels", "text as path"])
def test_multipliers_are_never_shown_under_other_paths(damage, damaged, capsys):
    run = json.loads((damaged / RUN_FILE).read_text())
    first = run["components"][0]
    if damage == "no components":
        run["components"] = []
    elif damage == "a path less":
        first["paths"].pop()
    elif damage == "a path more":
        first["paths"].append(["layer.9", None])
    elif damage == "text as levels":
        first["levels"] = "L1"
    else:
        first["paths"][0] = "layer"
    (damaged / RUN_FILE).write_text(json.dumps(run))
    code, text = said(capsys, "info", str(damaged))
    assert code == 2 and "expected one that `hsaid train` wrote" in text and "largest change" not in text, text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["empty", "directory", "fifo", "device", "loop", "no permission", "missing"])
@pytest.mark.filterwarnings("ignore:directory")
def test_files_of_other_kinds(file, kind, damaged, capsys):
    path = damaged / file
    if kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        path.chmod(0)
    else:
        path.unlink()
        {
            "empty": path.touch,
            "directory": path.mkdir,
            "fifo": lambda: os.mkfifo(path),
            "device": lambda: path.symlink_to("/dev/zero"),
            "loop": lambda: path.symlink_to(path.name),
            "missing": lambda: None,
        }[kind]()
    code, text = said(capsys, "info", str(damaged))
    if file == VALUES_FILE:
        assert code == 2, text
        if kind != "missing":
            with pytest.raises((ValueError, OSError), match="expected"):
                HSAID.from_pretrained(damaged, bert())


VALUES = [
    "",
    "-1",
    "0",
    "1e9",
    "nan",
    "inf",
    "9" * 30,
    "x",
    "ä\u0301",
    "\ud800",
    "-",
    "--",
    "a\nb",
    ".",
    "/",
    "/dev/null",
    "%s",
    "L1|L1",
]


def test_senseless_arguments(whole, capsys, tmp_path, monkeypatch):
    """Options of `train` with values that none of them can have lead to a sentence before anything is trained."""
    monkeypatch.chdir(tmp_path)
    options = ("--steps", "--epochs", "--batch-size", "--lr", "--seed", "--threads", "--intrinsic-dim", "--max-length")
    choices = ("--normalize", "--diagonal", "--dtype", "--mbert-steps", "--no-such-option", "--data", "--model")
    for option in options + choices:
        for value in VALUES:
            if option in ("--seed", "--mbert-steps") and value == "0":
                continue
            code, _ = said(capsys, "train", "--model", str(tmp_path / "none"), option, value)
            assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_arguments_in_any_order(whole, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    words = [
        "info",
        "graph",
        "merge",
        "predict",
        str(whole),
        "--model",
        "--heads",
        "--partition",
        "--fold",
        "--no-fold",
    ]
    words += ["-o", "--weights", "--to", "--data", *VALUES]
    for _ in range(200):
        said(capsys, *(draw.choice(words) for _ in range(draw.randrange(5))))
