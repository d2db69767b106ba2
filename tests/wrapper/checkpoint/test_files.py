"""A checkpoint gives back the same weights bit for bit, or says in one sentence why not; saving never spoils one."""

import builtins
import copy
import errno
import hashlib
import json
import os
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from helpers import sequence
from models import BACKENDS
from torch import nn

from hsaid_kernels.wrapper.checkpoint import configuration
from hsaid_kernels.wrapper.checkpoint import files as checkpoint
from hsaid_kernels.wrapper.checkpoint.files import CONFIG_FILE, VALUES_FILE, read_config
from hsaid_kernels.wrapper.hsaid import HSAID
from hsaid_kernels.wrapper.w0.checks import differences


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(model: nn.Module, *args, **options) -> HSAID:
    hsaid = HSAID(model, *(args or (24,)), **{"backend": "reference", **options})
    with torch.no_grad():
        hsaid.theta.normal_()
        hsaid.multipliers.uniform_(0.5, 1.5)
    return hsaid


def load(directory, model: nn.Module) -> HSAID:
    return HSAID.from_pretrained(directory, model, backend="reference")


def values(hsaid: HSAID) -> list[list[float]]:
    return [parameter.tolist() for parameter in hsaid.parameters()]


def rewrite(directory, config: dict | None = None, **tensors: torch.Tensor) -> None:
    """Puts other contents into a checkpoint, with a digest that is right for them."""
    path = directory / VALUES_FILE
    data = path.read_bytes()
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["config"]
    text = json.dumps({**json.loads(text), **(config or {})})
    tensors = {**safetensors.torch.load(data), **tensors}
    metadata = {"config": text, "digest": checkpoint._digest(text, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    (directory / CONFIG_FILE).unlink()


# --- there and back


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(partition="did"),
        dict(partition="L1|L4", combine="sum"),
        dict(seed=2**64 - 1, width=32, diagonal="rademacher", normalize="tensor"),
        dict(skip=["L4:bias"], merge={"both": ["0", "2"]}, include=["0", "2"], exclude=r"2\.bias"),
    ],
)
def test_the_same_weights_bit_for_bit(tmp_path, backend, options):
    model = mlp()
    hsaid = trained(model, 24, backend=backend, **options)
    hsaid.save_pretrained(tmp_path / "made" / "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = HSAID.from_pretrained(tmp_path / "made" / "here", copy.deepcopy(model), backend=backend)
    assert loaded.backend == backend and values(loaded) == values(hsaid)
    expected, got = hsaid.weights(), loaded.weights()
    assert list(got) == list(expected) and all(torch.equal(got[name], w) for name, w in expected.items())
    assert loaded.configuration() == hsaid.configuration()
    assert all(p.requires_grad for p in loaded.parameters() if len(p))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_dtype_is_the_models_unless_it_was_given(tmp_path, dtype):
    model = mlp()
    trained(model, dtype=dtype).save_pretrained(str(tmp_path))
    loaded = load(str(tmp_path), copy.deepcopy(model))
    assert loaded.given_dtype == dtype and loaded.dtype == (dtype or torch.float32)
    assert read_config(tmp_path)["dtype"] == ("bfloat16" if dtype else "float32")
    with pytest.warns(UserWarning, match="W0 is not what was trained from"):
        assert load(tmp_path, copy.deepcopy(model).bfloat16()).dtype == torch.bfloat16


def test_nan_and_signed_zero_come_back(tmp_path):
    model = mlp()
    hsaid = trained(model)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42])
    with torch.no_grad():
        hsaid.theta[:5] = special
    hsaid.save_pretrained(tmp_path)
    loaded = load(tmp_path, copy.deepcopy(model))
    assert torch.equal(loaded.theta.view(torch.int32), hsaid.theta.view(torch.int32))


SILENT = {
    "padding_rows": {},
    "chunks": "all",
    "architecture": None,
    "w0_dtypes": None,
    "experts": False,
    "layouts": 1,
    "names": {},
}


def test_both_files_show_the_configuration(tmp_path):
    trained(mlp(), seed=7).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [VALUES_FILE, CONFIG_FILE]
    config = read_config(tmp_path)
    assert config["generator"] == "philox4x32-10.v1" and config["seed"] == 7 and config["intrinsic_dim"] == 24
    assert config["tensors"] == {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    silent = {key: config.pop(key) for key in SILENT}  # are not written
    assert silent == SILENT
    shown = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert list(shown)[1:] == sorted(config) and shown.pop("about") == checkpoint.ABOUT
    tree = {"0": {"weight": "6x4", "bias": "6"}, "2": {"weight": "3x6", "bias": "3"}}
    assert shown == {**config, "tensors": tree}


def test_mbert_fits_in_16_kilobytes(tmp_path):
    config = dict(vocab_size=119547, hidden_size=8, num_attention_heads=2, intermediate_size=32, num_hidden_layers=12)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
    hsaid = trained(model, 1000)
    hsaid.save_pretrained(tmp_path)
    tensors = read_config(tmp_path)["tensors"]
    assert list(tensors.items()) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert len(tensors) == 201 and hsaid.partition.num_multipliers == 49
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 16 * 1024


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": ()},
        {"0": (1,), "1": (1,), "2": (2,), "3": (1,)},
        {"9.a": (2, 3), "10.a": (2, 3), "11.a": (2, 3), "13.a": (2, 3)},
        {"01.a": (2,), "2.a": (2,), "٣.a": (2,), "4.a": (2,)},
        {"1.a": (2,), "0.a": (2,), "1x.a": (2,), "01.a": (2,), "02.a": (2,), "²": (2,), "³": (2,)},
        {"0.a": (2,), "0.b": (2,), "1.b": (2,), "1.a": (2,)},
        {f"l.{i}.{j}.w": (4, i // 2) for i in range(1, 6) for j in range(3)},
    ],
)
def test_names_and_shapes_are_packed_without_loss(shapes):
    packed = json.loads(json.dumps(configuration._pack(shapes)))
    assert list(configuration._unpack(packed).items()) == list(shapes.items())


def test_equal_neighbours_are_packed_into_one():
    shapes = {f"layer.{i}.weight": (4, 4) for i in range(12)}
    assert configuration._pack(shapes) == {"layer": {"0..11": {"weight": "4x4"}}}


# What HSAID(..., 50) saved when the width for 46 values of theta was 64 by default, and a digest of its weights.
WIDTH_64 = """
{"format":1,"generator":"philox4x32-10.v1","intrinsic_dim":50,"partition":"L1+L2|L3|L4","combine":"product","skip":[],
"merge":{},"heads":false,"pruned":{},"normalize":"global","diagonal":"gaussian","width":64,"seed":0,"task":"default",
"include":null,"exclude":null,"train_fully":null,"dtype":"float32","dtype_given":false,
"tensors":{"0":{"weight":"16x20","bias":"16"},"2":{"weight":"3x16","bias":"3"}},"full":{},"frozen":{},
"w0_checks":"c7fc 69a2 c6ba e4c2"}
""".replace("\n", "")
WIDTH_64_DIGEST, WIDTH_64_WEIGHTS = "c344dfbc091d19a29e92ed3afb029e30", "210d750b5d9f6789feb155cafa5f9490"


def model_of_width_64() -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(sequence(parameter.numel()).view(parameter.shape))
    return model


@pytest.fixture
def of_width_64(tmp_path):
    saved = {"theta": sequence(46, 31, 89), "multipliers": 1 + sequence(4, 29, 97)}
    metadata = {"config": WIDTH_64, "digest": WIDTH_64_DIGEST}  # which is compared with the values when they are read
    (tmp_path / VALUES_FILE).write_bytes(safetensors.torch.save(saved, metadata))
    return tmp_path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error")
def test_a_checkpoint_keeps_its_width(of_width_64, backend):
    hsaid = HSAID.from_pretrained(of_width_64, model_of_width_64(), backend=backend)
    assert hsaid.plan.width == 64
    digest = hashlib.blake2b(digest_size=16)
    for weight in hsaid.weights().values():
        digest.update(weight.detach().contiguous().numpy().tobytes())
    assert digest.hexdigest() == WIDTH_64_WEIGHTS


def test_a_task_of_another_width_is_refused_with_the_way_out(of_width_64):
    with HSAID(model_of_width_64(), 50, task="new") as hsaid:
        with pytest.raises(ValueError, match="expected width 256, as in .* got 64: wrap the model with width=64 for"):
            hsaid.load_task(of_width_64)
        assert hsaid.tasks == ("new",)
    hsaid = HSAID(model_of_width_64(), 50, width=64, task="new")
    assert hsaid.load_task(of_width_64) == "default"


# --- what saving can meet


def test_a_later_save_replaces_the_earlier(tmp_path):
    model = mlp()
    hsaid = trained(model)
    hsaid.save_pretrained(tmp_path)
    with torch.no_grad():
        hsaid.theta.add_(1)
    hsaid.save_pretrained(tmp_path)
    assert values(load(tmp_path, copy.deepcopy(model))) == values(hsaid)
    assert sorted(os.listdir(tmp_path)) == [VALUES_FILE, CONFIG_FILE]


class Broken:
    """Lets `after` calls of `function` pass and then fails."""

    def __init__(self, function, after: int, error: BaseException):
        self.function, self.left, self.error = function, after, error

    def __call__(self, *args, **kwargs):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "step, after, new",
    [("open", 0, 0), ("open", 1, 0), ("fsync", 0, 0), ("fsync", 1, 0), ("replace", 0, 0), ("replace", 1, 1)],
)
def test_a_failure_at_any_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step, after, new, error):
    model = mlp()
    hsaid = trained(model)
    hsaid.save_pretrained(tmp_path)
    states = [values(hsaid)]
    with torch.no_grad():
        hsaid.theta.add_(1)
    states.append(values(hsaid))
    where = builtins if step == "open" else os
    with monkeypatch.context() as patch:
        patch.setattr(where, step, Broken(getattr(where, step), after, error))
        with pytest.raises(type(error)) as raised:
            hsaid.save_pretrained(tmp_path)
    if isinstance(error, OSError):
        expected = f"directory: expected one that can be written to, got {str(tmp_path)!r}: No space left on device"
        assert str(raised.value) == expected and raised.value.errno == errno.ENOSPC
    assert sorted(os.listdir(tmp_path)) == [VALUES_FILE, CONFIG_FILE]
    assert values(load(tmp_path, copy.deepcopy(model))) == states[new]


def test_a_half_written_file_is_not_left(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    real = open
    monkeypatch.setattr(builtins, "open", lambda *args: Full(real(*args)))
    with pytest.raises(OSError, match="No space left"):
        trained(mlp()).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_between_the_two_replacements_the_new_checkpoint_counts(tmp_path, monkeypatch):
    """As after a power cut there: the new values with the old JSON."""
    model = mlp()
    trained(model, seed=1).save_pretrained(tmp_path)
    readable = (tmp_path / CONFIG_FILE).read_text()
    hsaid = trained(copy.deepcopy(model), seed=2)
    hsaid.save_pretrained(tmp_path)
    for other in (readable, "{", None):
        (tmp_path / CONFIG_FILE).unlink()
        if other is not None:
            (tmp_path / CONFIG_FILE).write_text(other)
            with pytest.warns(UserWarning, match="hsaid_config.json' is not what hsaid.safetensors says"):
                assert read_config(tmp_path)["seed"] == 2
            (tmp_path / CONFIG_FILE).write_text(readable)
        else:
            assert read_config(tmp_path)["seed"] == 2


def test_no_permission(tmp_path, monkeypatch):
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(builtins, "open", Broken(open, 0, refusal))
    with pytest.raises(PermissionError, match="directory: expected one that can be written to, .*: Permission denied"):
        trained(mlp()).save_pretrained(tmp_path)


def test_a_file_in_the_directorys_place(tmp_path):
    (tmp_path / "file").write_text("here")
    hsaid = trained(mlp())
    with pytest.raises(FileExistsError, match="expected one that can be written to, got .*file'"):
        hsaid.save_pretrained(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="expected one that can be written to, got .*below'"):
        hsaid.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "here"


# --- what loading can meet


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_checkpoint(tmp_path, place):
    with pytest.raises(FileNotFoundError, match="expected one with a checkpoint, got no file .*hsaid.safetensors"):
        load(tmp_path / place, mlp())


def test_truncated_at_any_length(tmp_path):
    trained(mlp()).save_pretrained(tmp_path)
    path = tmp_path / VALUES_FILE
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="expected a whole checkpoint, got a truncated or foreign .*safetensors"):
            read_config(tmp_path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="expected a whole checkpoint"):
        read_config(tmp_path)


def test_any_flipped_bit_is_noticed(tmp_path):
    trained(mlp()).save_pretrained(tmp_path)
    path = tmp_path / VALUES_FILE
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="expected (a whole|the) checkpoint"):
            read_config(tmp_path)


@pytest.mark.parametrize(
    "config, reason",
    [
        (dict(format=2), "expected format 1, the only one known here, got 2"),
        (dict(generator="philox4x32-10.v2"), "expected generator 'philox4x32-10.v1', .* got 'philox4x32-10.v2'"),
    ],
)
def test_unknown_versions(tmp_path, config, reason):
    trained(mlp()).save_pretrained(tmp_path)
    rewrite(tmp_path, config)
    for read in (read_config, lambda directory: load(directory, mlp())):
        with pytest.raises(ValueError, match=reason):
            read(tmp_path)


def test_checkpoints_from_before_tasks_and_full_training_load(tmp_path):
    model = mlp()
    hsaid = trained(model)
    hsaid.save_pretrained(tmp_path)
    path = tmp_path / VALUES_FILE
    data = path.read_bytes()
    values = safetensors.torch.load(data)
    config = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["config"])
    text = json.dumps({key: config[key] for key in config if key not in ("task", "train_fully", "full")})
    metadata = {"config": text, "digest": checkpoint._digest(text, values)}
    path.write_bytes(safetensors.torch.save(values, metadata))
    (tmp_path / CONFIG_FILE).unlink()
    other = HSAID.from_pretrained(tmp_path, copy.deepcopy(model))
    assert torch.equal(other.theta, hsaid.theta) and other.task == "default" and not other.full
    state = hsaid.state_dict() | {"_extra_state": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    other.load_state_dict(state)


@pytest.mark.parametrize(
    "tensors, reason",
    [
        (dict(theta=torch.zeros(1)), r"expected theta of shape \[20\] .*, got shape \[1\] \(torch.float32\)"),
        (dict(multipliers=torch.zeros(9)), r"expected multipliers of shape .*, got shape \[9\] \(torch.float32\)"),
        (
            dict(theta=torch.zeros(20, dtype=torch.float64)),
            r"theta of shape \[20\] \(torch.float32\), got shape \[20\] \(torch.float64\)",
        ),
    ],
)
def test_values_that_do_not_fit(tmp_path, tensors, reason):
    model = mlp()
    assert len(trained(model).theta) == 20
    trained(model).save_pretrained(tmp_path)
    rewrite(tmp_path, **tensors)
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, copy.deepcopy(model))
    other = HSAID(copy.deepcopy(model), 24, backend="reference", task="own")
    with pytest.raises(ValueError, match=reason):
        other.load_task(tmp_path)
    assert other.task == "own" and other.tasks == ("own",)


def test_a_foreign_file(tmp_path):
    safetensors.torch.save_file({"theta": torch.zeros(3)}, tmp_path / VALUES_FILE)
    with pytest.raises(ValueError, match="truncated or foreign"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "other, reason",
    [
        (
            lambda: mlp().append(nn.Linear(3, 2)),
            r"the 4 tensors that were trained, got others: '3.weight' of shape \(2, 3\) is unexpected, '3.bias' of",
        ),
        (
            lambda: mlp()[:2],
            r"'2.weight' of shape \(3, 6\) is missing, '2.bias' of shape \(3,\) is missing$",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
            r"'0.weight' has shape \(8, 4\) in place of \(6, 4\), '0.bias' has .*, '2.weight' has shape .* \(3, 6\)$",
        ),
        (
            lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))),
            r"(has shape.*){3}, 3 more$",
        ),
    ],
)
def test_a_model_with_other_tensors(tmp_path, other, reason):
    trained(mlp()).save_pretrained(tmp_path)
    model = other()
    with pytest.raises(ValueError, match=reason):
        load(tmp_path, model)
    HSAID(model, 24)  # the refusal has not wrapped it


def test_the_same_tensors_in_another_order(tmp_path):
    class Net(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(2, 2))

    trained(Net("ab")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got others: they are in another order"):
        load(tmp_path, Net("ba"))


def test_another_w0_is_warned_of_by_name(tmp_path):
    model = mlp()
    hsaid = trained(model)
    hsaid.save_pretrained(tmp_path)
    other = copy.deepcopy(hsaid).unwrap()
    other[2].reset_parameters()
    with pytest.warns(
        UserWarning, match=r"in 2 of 4 tensors \('2.weight', '2.bias'\), 41.2% of the weights, so these will"
    ) as caught:
        loaded = HSAID.from_pretrained(tmp_path, other)
    assert values(loaded) == values(hsaid) and caught[0].filename == __file__


def test_a_wrapped_model_is_refused(tmp_path):
    hsaid = trained(mlp())
    hsaid.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no HSAID wraps"):
        load(tmp_path, hsaid.model)


def test_differences():
    shapes = {"a": (2,), "b": (), "c": (3, 3)}
    assert differences(shapes, shapes) == ""
    assert differences(shapes, {"a": (2,), "c": (3,), "d": (1,)}) == (
        "'b' of shape () is missing, 'c' has shape (3,) in place of (3, 3), 'd' of shape (1,) is unexpected"
    )
    assert differences({}, {str(i): (1,) for i in range(5)}).endswith("'2' of shape (1,) is unexpected, 2 more")
