"""Packed checkpoints: small, the same bytes, loaded as they were rounded, or refused in one sentence."""

import json
import sys
import warnings
import zlib

import pytest
import torch
from torch import nn

from hsaid_kernels.wrapper.checkpoint import packing
from hsaid_kernels.wrapper.checkpoint.packing import as_text, pack, read_packed, unpack
from hsaid_kernels.wrapper.hsaid import HSAID

pytest.importorskip("constriction")


def mlp(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 3))


def trained(d=200, **options) -> HSAID:
    hsaid = HSAID(mlp(), d, **options)
    with torch.no_grad():
        hsaid.theta.normal_()
        hsaid.multipliers.normal_(1, 0.2)
        for parameter in hsaid.full.values():
            parameter.normal_()
    hsaid.model[1](torch.randn(8, 30))  # changes the statistics of BatchNorm
    return hsaid


def saved(hsaid, path, *args, **options):
    path.write_bytes(hsaid.pack(*args, **options))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(partition="did"),
        dict(partition="L1|L4", combine="sum", skip=["L4:bias"]),
        dict(seed=2**64 - 1, width=32, diagonal="rademacher", normalize="tensor", task="größer"),
        dict(include=["0", "3"], exclude=r"3\.bias", dtype=torch.bfloat16),
        dict(train_fully="3", merge={"both": ["0", "1"]}),
        dict(frozen=["0.bias"]),
    ],
)
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_there_and_back(tmp_path, options, bits):
    hsaid = trained(**options)
    path = saved(hsaid, tmp_path / "task.hsz", bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = HSAID.from_pretrained(path, mlp())
    assert again.pack(bits) == path.read_bytes()
    assert again.configuration() == hsaid.configuration()
    theta, multipliers = hsaid.theta.detach(), hsaid.multipliers.detach()
    assert (again.theta - theta).square().mean() < {1: 0.5, 4: 0.025, 16: 1e-7}[bits]
    if len(multipliers):
        assert (again.multipliers - multipliers).abs().max() < 0.01
    for name, value in hsaid.full.items():
        assert (again.full[name] - value).abs().max() < 0.1
    buffers = hsaid.buffers_changed()
    assert len(buffers) == 3 and all(again.buffers_changed()[name].equal(value) for name, value in buffers.items())


def test_tasks_are_added_from_packed_checkpoints(tmp_path):
    first = HSAID(mlp(), 200, task="first")
    second = HSAID(mlp(), 200, task="second")
    with torch.no_grad():
        second.theta.normal_()
    assert first.load_task(saved(second, tmp_path / "task.hsz", 16)) == "second"
    assert (first.theta - second.theta).abs().max() < 1e-3
    with pytest.raises(ValueError, match="directory: expected seed 0, as in this HSAID, got 1"):
        first.load_task(saved(HSAID(mlp(), 200, seed=1), tmp_path / "task.hsz"))


def test_the_size_of_a_thousand_values():
    """BERT's names, a normal theta: the configuration takes some bytes, and theta its entropy."""
    config, values = trained(1000)._checkpoint()
    values = {name: value for name, value in values.items() if "." not in name}
    config |= {"padding_rows": {"bert.embeddings.word_embeddings.weight": 0}}
    found = unpack(data := pack(config, values, 4))
    assert len(data) < 500
    assert found.bits["settings"] < 8 * 12
    size = sum(found.bits[what] for what in ("theta", "multipliers")) / 8
    assert packing.HEAD.size + 4 + 12 + size + 8 > len(data) > size


def test_fields_of_other_versions_are_kept_by_name():
    config, values = trained()._checkpoint()
    data = pack(config | {"chunks": "one", "theta_of": ["a", "b"]}, values)
    found = unpack(data).config
    assert (found["chunks"], found["theta_of"]) == ("one", ["a", "b"])
    assert len(data) < len(pack(config, values)) + 50


def test_the_same_bytes_for_ever():
    """Format 1, as it was first written."""
    config, values = HSAID(mlp(), 50, "did")._checkpoint()
    config |= {"tensors": {"weight": (3, 4)}, "full": {}, "w0_checks": "1a2b"}
    values |= {"theta": torch.arange(50) % 7 * 0.25 - 0.75}
    data = pack(config, values, 3, run={"labels": ["a", "b"]})
    assert data.hex() == (
        "48535a0155eccdaa58065d1304d8ff0e000017000000c3e10c532c8e4004b3a91996504e042a48528aadad050094a682147150204a8ab6"
        "dd4426bb911fa59432c8b9a7a8d6"
    )
    found = unpack(data)
    assert found.values["theta"].equal(values["theta"]) and found.run == {"labels": ["a", "b"]}
    assert found.config["intrinsic_dim"] == 50 and found.config["partition"] == "did"


def test_text_is_read_as_the_file_is(tmp_path):
    hsaid = trained()
    data = hsaid.pack()
    (tmp_path / "task.txt").write_text("  " + as_text(data)[:40] + "\n" + as_text(data)[40:] + "\n")
    assert HSAID.from_pretrained(tmp_path / "task.txt", mlp()).pack() == data


def test_every_flipped_bit_and_every_cut_is_refused(tmp_path):
    data = trained(60).pack()
    for place in range(3 * 8, 8 * len(data), 5):
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="data: expected the packed checkpoint that was written, got a trunc"):
            unpack(bytes(broken))
    for stop in range(3, len(data), 7):
        with pytest.raises(ValueError, match="got a truncated or corrupted one"):
            unpack(data[:stop])


@pytest.mark.parametrize("foreign", [b"", b"HS", b"PK\3\4" + bytes(99), b"SFN", b"\x89PNG\r\n"])
def test_foreign_files_are_refused(tmp_path, foreign):
    (tmp_path / "x").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"file: '.*x': expected a packed checkpoint, got something else"):
        HSAID.from_pretrained(tmp_path / "x", mlp())


def test_text_that_was_changed_is_refused():
    with pytest.raises(ValueError, match="truncated or corrupted"):
        unpack(b"SFNa!!!!")


def with_crc(data):
    return data + zlib.crc32(data).to_bytes(4, "little")


def test_other_versions_and_contents_are_refused():
    data = trained(60).pack()[:-4]
    with pytest.raises(ValueError, match="expected a packed checkpoint of version 1, got version 9"):
        unpack(with_crc(data[:3] + b"\x09" + data[4:]))
    with pytest.raises(ValueError, match="expected the configuration of a packed checkpoint, got"):
        unpack(with_crc(data[: packing.HEAD.size] + b"\xff" * 40))


@pytest.mark.parametrize("wrong", [None, -1, 2**70, "x", {"a": [1, 2]}])
@pytest.mark.parametrize(
    "key", ["m", "intrinsic_dim", "coded", "raw", "run", "width", "partition", "frozen", "dtype", "seed"]
)
def test_configurations_of_another_kind(key, wrong, tmp_path):
    """They load, or are refused in a sentence, though the CRC is right."""
    data = trained(60).pack()
    start, length = packing.HEAD.size, packing.HEAD.unpack_from(data)[-1]
    about = json.loads(zlib.decompressobj(-15, packing.WORDS).decompress(data[start : start + length]))
    text = packing._deflated(about | {key: wrong})
    head = packing.HEAD.pack(*packing.HEAD.unpack_from(data)[:-1], len(text))
    (tmp_path / "x").write_bytes(with_crc(head + text + data[start + length : -4]))
    try:
        HSAID.from_pretrained(tmp_path / "x", mlp())
    except (ValueError, TypeError) as error:
        assert "expected" in str(error)


def test_another_w0_is_warned_of(tmp_path):
    path = saved(trained(), tmp_path / "task.hsz")
    with pytest.warns(UserWarning, match="model: W0 is not what was trained from in some of 6 tensors"):
        HSAID.from_pretrained(path, mlp(seed=1))


def test_another_model_is_refused(tmp_path):
    path = saved(trained(), tmp_path / "task.hsz")
    other = nn.Sequential(nn.Linear(20, 31), nn.Linear(31, 3))
    with pytest.raises(
        ValueError, match="model: expected the tensors that were trained, got 4 of other names or shapes"
    ):
        HSAID.from_pretrained(path, other)


@pytest.mark.parametrize("options", [dict(bits=0), dict(bits=17), dict(multiplier_bits=99)])
def test_widths_that_cannot_be(options):
    with pytest.raises(ValueError, match="bits: expected .*1.*16.*, got (0|17|99)"):
        trained().pack(**options)


def test_values_that_are_not_finite_are_refused():
    hsaid = trained()
    with torch.no_grad():
        hsaid.theta[3] = float("inf")
    with pytest.raises(ValueError, match="expected finite values, got nan or inf"):
        hsaid.pack()


def test_a_missing_package_is_named(monkeypatch):
    hsaid = trained()
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="packed checkpoints need the package constriction: pip install constriction"):
        hsaid.pack()


class Loss(nn.Module):
    """A model whose output has a loss, as those of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, x, y):
        output = self.layers(x)
        return type("Output", (), {"loss": (output - y).square().mean(), "output": output})


def test_pack_with_data_tunes_on_the_levels(tmp_path):
    """theta is half way between levels, and the best loss is where it is: tuning finds a better one than rounding."""
    hsaid = HSAID(Loss(), 40, "did")
    with torch.no_grad():
        hsaid.theta.normal_(std=2.0)
        x = torch.randn(200, 6)
        y = hsaid(x, torch.zeros(200, 1)).output

    def loss(path):
        return HSAID.from_pretrained(path, Loss())(x, y).loss.item()

    rounded = loss(saved(hsaid, tmp_path / "rounded.hsz", 2))
    tuned = loss(saved(hsaid, tmp_path / "tuned.hsz", 2, data=[{"x": x, "y": y}] * 60))
    assert tuned < 0.8 * rounded
    assert read_packed(tmp_path / "tuned.hsz").values["theta"].equal(hsaid.theta.detach())
