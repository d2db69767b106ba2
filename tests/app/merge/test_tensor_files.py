"""Files are read as safetensors reads them, and written, piece by piece, with the bytes that it writes."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsaid_kernels.app.merge import tensor_files
from hsaid_kernels.app.merge.tensor_files import FLOATS, NewFiles, TensorFile

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16)
DTYPES += (torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32, torch.complex64)


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype, of odd sizes, scalars and empty ones, with names in no order, one of them not in ASCII."""
    found = {}
    for number, dtype in enumerate(DTYPES):
        for name, shape in ((f"b.{number}", (3, 5)), (f"a.{number}", ()), (f"ü.{number}", (2, 0))):
            found[name] = torch.arange(15)[: max(1, 15 * (shape == (3, 5)))].to(dtype).reshape(-1)
            found[name] = found[name][:0].view(shape) if 0 in shape else found[name].view(shape)
    return found


def test_the_bytes_that_safetensors_writes(tmp_path):
    metadata = {"format": "pt", "note": "ä"}
    source, target = tmp_path / "source", tmp_path / "target"
    # With several keys the library itself writes them in any order.
    for given in (None, {}, {"format": "pt"}):
        save_file(tensors(), source, given)
        file = TensorFile(source)
        assert file.metadata == given
        about = {name: (entry.dtype, entry.shape, entry.size) for name, entry in file.entries.items()}
        with NewFiles({target: about}, {target: file.metadata}) as new:
            for name in reversed(about):
                for piece in file.tensor(name).reshape(-1).split(2):
                    new.write(name, piece)
                    file.used(piece.nbytes)
        assert target.read_bytes() == source.read_bytes()
        target.unlink()
    save_file(tensors(), source, metadata)
    assert TensorFile(source).metadata == metadata


def test_tensors_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "HELD", 16)  # gives memory back all the time
    save_file(tensors(), tmp_path / "file", {"format": "pt"})
    file, expected = TensorFile(tmp_path / "file"), load_file(tmp_path / "file")
    for name, tensor in expected.items():
        got = file.tensor(name)
        if file.entries[name].dtype in FLOATS:
            assert got.dtype == tensor.dtype and torch.equal(got, tensor)
        elif tensor.numel():
            assert torch.equal(got, tensor.reshape(-1).view(torch.uint8))
        file.used(max(1, got.nbytes))


def test_a_header_that_is_not_padded(tmp_path):
    """As other programs write it: values are not at multiples of their size."""
    save_file({"a": torch.arange(7.0)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * ((7 - len(header)) % 4)
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert TensorFile(tmp_path / "odd").entries["a"].begin % 4
    assert torch.equal(TensorFile(tmp_path / "odd").tensor("a"), torch.arange(7.0))


@pytest.mark.parametrize("length", [0, 7, 20, 90, -1])
def test_what_is_not_whole(length, tmp_path):
    save_file({"a": torch.arange(7.0)}, tmp_path / "file")
    (tmp_path / "part").write_bytes((tmp_path / "file").read_bytes()[:length])
    with pytest.raises(ValueError, match="expected a whole safetensors file, got .*part"):
        TensorFile(tmp_path / "part")


def test_no_file_stays_open(tmp_path, monkeypatch):
    """After an error of a piece, or of the header of a second file."""
    about = {"a": ("F32", [100], 400)}
    right, calls = os.pwrite, []

    def refuse(handle, data, at):
        calls.append(at)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(handle, data, at)

    monkeypatch.setattr(tensor_files.os, "pwrite", refuse)
    path = tmp_path / "full"
    with pytest.raises(OSError, match="No space left"), NewFiles({path: about}, {path: {}}) as new:
        new.write("a", torch.arange(50.0))
    calls.clear()
    paths = tmp_path / "first", tmp_path / "second"
    with pytest.raises(OSError, match="No space left"):
        NewFiles(dict.fromkeys(paths, about), dict.fromkeys(paths, {})).__enter__()
    open_files = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    assert not any(str(tmp_path) in os.path.realpath(f"/proc/self/fd/{number}") for number in open_files)


def test_pieces_that_are_written_in_part(tmp_path, monkeypatch):
    """As the system may do."""
    right = os.pwrite
    monkeypatch.setattr(tensor_files.os, "pwrite", lambda handle, data, at: right(handle, data[:3], at))
    about = {"a": ("F32", [6], 24)}
    with NewFiles({tmp_path / "a": about}, {tmp_path / "a": {}}) as new:
        new.write("a", torch.arange(6.0))
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.arange(6.0))
