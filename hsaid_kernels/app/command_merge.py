"""`hsaid merge`: writes the tuned weights as files of an ordinary model, from those of W0 and of checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hsaid_kernels.app import trained
from hsaid_kernels.app.architecture import build_trained, folder_of, guess_trained, quiet
from hsaid_kernels.app.merge.base import Base
from hsaid_kernels.app.merge.merge import Merging
from hsaid_kernels.app.merge.weights import Trained
from hsaid_kernels.app.terminal import progress, say, user_input
from hsaid_kernels.wrapper.checkpoint import hub
from hsaid_kernels.wrapper.checkpoint.configuration import SHAPES
from hsaid_kernels.wrapper.checkpoint.files import VALUES_FILE, read

ADAPTER = "adapter_config.json"  # of peft

Run = Mapping[str, Any]


def merge(arguments: argparse.Namespace) -> None:
    """Merges the checkpoints into files of their model, and prints where these are.

    Raises UsageError for invalid arguments, and if the files cannot be written.
    """
    with user_input(), _one_thread(), quiet():
        if arguments.out is None and arguments.to is None:
            raise ValueError("-o: expected a directory to write to, or --to hub:NAME, got neither")
        checkpoints = _read(arguments.checkpoints, arguments.weights)
        where = Path(checkpoints[0].where)
        run: Run = trained.read_run(where) if (where / trained.RUN_FILE).exists() else {}
        source = arguments.model or run.get("model")
        if source is None:
            raise ValueError(f"--model: expected the one that {str(where)!r} was trained from, as it does not say")
        base = Base(folder_of(source))
        _check_out(arguments.out, [base.folder, *(Path(each.where) for each in checkpoints)])
        dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
        merging = Merging(checkpoints, _architecture(checkpoints[0], source, run), base, run.get("seed"), dtype)
        with contextlib.ExitStack() as stack:
            out = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()), "merged")
            _write(merging, out)
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            say("merged", f"{len(merging.units)} tensors, {size:,} bytes" + (f" in {out}" if arguments.out else ""))
            if arguments.to is not None:
                (out / "README.md").write_text(hub.card_of_merged(arguments.to, source), encoding="utf-8")
                say("uploaded", hub.upload(out, arguments.to, commit_message="Upload merged model"))


def _read(directories: Sequence[str], weights: Sequence[float] | None) -> list[Trained]:
    if weights is None and len(directories) == 1:
        weights = [1.0]
    if weights is None or len(weights) != len(directories):
        got = "none" if weights is None else len(weights)
        raise ValueError(f"--weights: expected one for each of {len(directories)} checkpoints, got {got}")
    return [_read_one(directory, weight) for directory, weight in zip(directories, weights, strict=True)]


def _read_one(directory: str, weight: float) -> Trained:
    where = Path(hub.local_directory(directory))
    if (where / ADAPTER).exists() and not (where / VALUES_FILE).exists():
        raise ValueError(
            f"directory: expected a checkpoint of an HSAID, got an adapter of peft in {directory!r}: merge it by peft, "
            "PeftModel.from_pretrained(model, directory).merge_and_unload()"
        )
    return Trained(str(where), *read(where), weight)


def _architecture(checkpoint: Trained, source: str, run: Run) -> nn.Module:
    config = checkpoint.config
    if config["architecture"] is not None:
        return build_trained(config["architecture"])
    return guess_trained([name for key in SHAPES for name in config[key]], source, run.get("labels"))


def _check_out(out: Path | None, taken: Sequence[Path]) -> None:
    if out is not None and out.exists() and any(path.exists() and path.samefile(out) for path in taken):
        raise ValueError(f"-o: expected another directory than the model's and the checkpoint's, got {str(out)!r}")


def _write(merging: Merging, out: Path) -> None:
    try:
        with progress(len(merging.units), "merging", "tensors") as advance:
            merging.write(out, advance)
    except OSError as error:
        raise OSError(
            f"-o: expected a directory that can be written to, got {str(out)!r}: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For a time, each thread computes by itself: a merge has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
