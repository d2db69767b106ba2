"""`HSAIDConfig`: the options of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig

from hsaid_kernels.wrapper.basis import Settings
from hsaid_kernels.wrapper.checkpoint.configuration import DTYPES, FIRST, TASK

LR_SCALE = 512.0


class _PeftType(str):
    """A member of PEFT's enum `PeftType`, to which nothing can be added, for all that PEFT asks of one."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


HSAID_TYPE = _PeftType("HSAID")


@dataclass
class HSAIDConfig(PeftConfig):
    """The configuration of an adapter in a random subspace: DID, SAID or H-SAID (docs/method.md).

    An adapter changes every tensor that is chosen, embeddings, norms and biases too, and has `intrinsic_dim` values in
    all. Whether the model's parameters require gradients makes no difference: PEFT freezes them.

    Args:
        intrinsic_dim, partition, seed, skip, merge, combine, normalize, diagonal, width, chunks, heads, experts,
            layouts, pruned, padding_rows, backend, memory: as in `HSAID`. Where None means something that depends on
            the model, the adapter's own configuration says what.
        dtype: of the weights: None, "float32", "bfloat16" or "float16", as in `HSAID`.
        target_modules: which modules' tensors, with those of the modules inside them. None means all of the model's.
            Otherwise as in other methods of PEFT: names, or ends of names; or a regular expression for the whole name;
            or "all-linear".
        exclude_modules: modules to leave out of these, in the same form.
        modules_to_save: modules that are trained as they are, and saved, as in other methods of PEFT. They do not count
            towards intrinsic_dim.
        lr_scale: what learning rates are multiplied by. PEFT's usual ones, 1e-4 to 2e-4, would move theta too little to
            learn anything; with 512, the default, they act as 0.05 to 0.1 do in `HSAID`. theta and the multipliers are
            kept as theta / lr_scale and (multipliers - 1) / lr_scale, so that weight decay pulls towards W0. With a
            power of two the weights are the same bits as those of an `HSAID` with theta and the multipliers. Optimizers
            without a scale of their own, such as SGD, see lr_scale twice: in the gradient too.
        init_weights: False begins with random values, for tests; True with the model as it is.

    Raises what `HSAID` raises for its arguments: here what is wrong whatever the model is, get_peft_model() the rest.
    """

    intrinsic_dim: int = 1000
    partition: str = "L1+L2|L3|L4"
    seed: int = 0
    skip: list[str] | None = None
    merge: dict[str, list[str]] | None = None
    combine: str = "product"
    normalize: str = "global"
    diagonal: str = "gaussian"
    width: int | None = None
    chunks: str | None = None
    heads: bool | None = None
    pruned: dict[str, list[int]] | None = None
    padding_rows: dict[str, int] | None = None
    dtype: str | None = None
    backend: str = "auto"
    memory: str = "step"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    lr_scale: float = LR_SCALE
    init_weights: bool = True
    experts: bool | None = None
    layouts: int | None = None

    trainable_token_indices = None  # not an option, though TRL sets it: get_peft_model() refuses another value

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HSAID_TYPE
        for key in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, key), list):
                setattr(self, key, set(getattr(self, key)))
        self.settings([])

    def settings(self, left_out: list[str]) -> Settings:
        """The options for the wrapper. `left_out` are the names of the tensors that are not projected."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected None or one of {', '.join(map(repr, DTYPES))}, got {self.dtype!r}")
        own = ["intrinsic_dim", "partition", "seed", "merge", "combine", "normalize", "diagonal", "width", "chunks"]
        own += ["heads", "experts", "layouts", "pruned", "padding_rows", "backend", "memory", "lr_scale"]
        options: dict[str, Any] = {key: getattr(self, key) for key in own}
        options |= dict(skip=self.skip or (), dtype=None if self.dtype is None else getattr(torch, self.dtype))
        options["names"] = None
        # A saved adapter says all of these; those of versions that knew no other chunks and layouts do not say theirs.
        if None not in (self.width, self.heads, self.pruned, self.padding_rows):
            options |= {key: FIRST[key] for key in ("chunks", "layouts") if options[key] is None}
        return Settings(**options, task=TASK, include=None, exclude=None, train_fully=None, frozen=left_out)
