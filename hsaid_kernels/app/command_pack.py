"""`hsaid pack` and `hsaid unpack`: a checkpoint as one small file, a text or a QR code, and back."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from hsaid_kernels.app import trained
from hsaid_kernels.app.terminal import say, user_input
from hsaid_kernels.files import replace_files
from hsaid_kernels.wrapper.checkpoint import files, packing

ENDINGS = {"file": ".hsz", "text": ".txt", "qr": ".png"}
SCALE = 4  # pixels of a module of a QR code


def pack(arguments: argparse.Namespace) -> None:
    """Packs `arguments.checkpoint` and says what takes how many bytes.

    Raises UsageError for invalid arguments, and if the file cannot be written.
    """
    with user_input():
        directory = Path(arguments.checkpoint)
        data = packed(directory, arguments.bits, arguments.multiplier_bits)
        kind = arguments.kind
        out = arguments.out or Path(f"task{ENDINGS[kind]}")
        contents = {"file": lambda: data, "text": lambda: f"{packing.as_text(data)}\n".encode(), "qr": lambda: qr(data)}
        _write(out, contents[kind]())
        found = packing.unpack(data)
    describe_size(found, len(data), str(out))


def packed(directory: Path, bits: int, multiplier_bits: int) -> bytes:
    """A checkpoint's packed form, with what `hsaid predict` needs where `hsaid train` wrote it.

    Raises as `files.read`, `read_run` and `packing.pack`.
    """
    config, values = files.read(directory)
    run = None
    if (directory / trained.RUN_FILE).exists():
        known = trained.read_run(directory)
        run = {key: known[key] for key in trained.NEEDED}
    return packing.pack(config, values, bits, multiplier_bits, run)


def unpack(arguments: argparse.Namespace) -> None:
    """Writes the directory that `hsaid train` would have, from a packed checkpoint of it.

    Raises UsageError for invalid arguments, if the model's W0 is another one, and if the files cannot be written.
    """
    from hsaid_kernels.app.training import load_trained, save_trained

    with user_input():
        found = packing.read_packed(arguments.packed)
        if not found.run:
            raise ValueError(
                f"file: expected a checkpoint that `hsaid train` wrote, got {str(arguments.packed)!r}, which does not "
                "say its model: HSAID.from_pretrained(file, model).save_pretrained(directory)"
            )
        run: dict[str, Any] = found.run | ({"model": arguments.model} if arguments.model else {})
        save_trained(load_trained(arguments.packed, arguments.model), arguments.out, **run)
    say("checkpoint", f"{trained.size(arguments.out):,} bytes in {arguments.out}")


def describe_size(found: packing.Packed, size: int, where: str) -> None:
    """Says how many bytes a packed checkpoint has, and for what."""
    say("packed", f"{size:,} bytes in {where}")
    bits = {what: number for what, number in found.bits.items() if number}
    say("", ", ".join(f"{what} {number / 8:,.1f}" for what, number in bits.items()))


def qr(data: bytes) -> bytes:
    """A PNG of a QR code whose text is the checkpoint in base64. Raises ValueError if there is no QR code so large."""
    try:
        import segno
    except ImportError as error:
        raise ImportError("--as qr: needs the package segno: pip install segno") from error
    text, image = packing.as_text(data), io.BytesIO()
    try:
        segno.make_qr(text, error="l").save(image, kind="png", scale=SCALE)
    except segno.DataOverflowError:
        raise ValueError(
            f"--as qr: expected a checkpoint of at most 2,214 bytes, got {len(data):,}: take fewer --bits"
        ) from None
    return image.getvalue()


def _write(out: Path, contents: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_files({out: contents})
    except OSError as error:
        raise OSError(f"--out: expected a file that can be written, got {str(out)!r}: {error.strerror}") from error
