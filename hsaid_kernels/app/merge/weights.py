"""`Weights`: what becomes of each tensor of W0, of one checkpoint or of several tasks at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsaid_kernels.fastfood.projection import Part, Projection
from hsaid_kernels.fastfood.rows import is_whole
from hsaid_kernels.wrapper.basis import Basis, Settings, basis_of
from hsaid_kernels.wrapper.checkpoint.compare import arguments_of, check_config, check_value
from hsaid_kernels.wrapper.checkpoint.configuration import Config, w0_checks
from hsaid_kernels.wrapper.tasks import key_of
from hsaid_kernels.wrapper.w0.beside import PREFIX, Buffers
from hsaid_kernels.wrapper.weights.graph import scaled_factors

PIECE = 2**18  # weights that are made at a time: they are still in the cache when they are written


@dataclass(frozen=True)
class Trained:
    """A checkpoint: where it is, what it says, its tensors, and the weight of its update of W0."""

    where: str
    config: Config
    values: Mapping[str, Tensor]
    weight: float = 1.0


def check_together(trained: Sequence[Trained]) -> None:
    """Raises ValueError unless the updates of these checkpoints can be added: one basis, W0, dtype, the same labels."""
    first, *others = trained
    for other in others:
        where = f"checkpoints: {other.where!r}"
        check_config(where, other.config | {"w0_checks": first.config["w0_checks"]}, first.config)
        if other.config["w0_checks"] != first.config["w0_checks"]:
            raise ValueError(f"{where}: expected the W0 of {first.where!r}, got one that was trained from another")
        models = [each.config["architecture"] for each in (first, other)]
        labels = [None if None in models else model.get("id2label") for model in models]
        for key, (expected, got) in {"dtype": (first.config["dtype"], other.config["dtype"]), "labels": labels}.items():
            if got != expected:
                raise ValueError(f"{where}: expected the {key} of {first.where!r}, {expected}, got {got}")
    if others and any(name.startswith(PREFIX) for each in trained for name in each.values):
        raise ValueError(
            "checkpoints: expected tasks that can be added, got one whose training changed buffers of the model, such "
            "as the statistics of BatchNorm: merge it by itself"
        )


class Weights:
    """The tensors of a merged model, from those of W0.

    Args:
        trained: one checkpoint, or several for which `check_together` raises nothing.
        model: the architecture that was trained, with tensors of any values.

    Attributes:
        projected, full: names of the tensors that are projected, and that were trained fully.
        w0_dtypes: {name: dtype} of W0 in training, where "*" stands for those that are not named; None as long as it
            is not known, because the checkpoint is of an older version.

    Raises ValueError if the model's tensors are not those that were trained, or a checkpoint lacks one of its own.
    """

    def __init__(self, trained: Sequence[Trained], model: nn.Module):
        self._trained, self._config = trained, trained[0].config
        basis = basis_of(model, Settings(**arguments_of(self._config, model), backend="auto", memory="block"))
        self._plan, self._kept, self._given = basis.plan, basis.padding_rows, basis.settings.dtype
        self.projected, self.full = frozenset(basis.plan.names), frozenset(basis.full)
        for each in trained:
            self._check_values(each.values, model, basis)
        self._tasks = []  # (theta, factors multiplied by the plan's scales and the weight of the task)
        for each in trained:
            factors = scaled_factors(basis.plan, basis.partition, each.values["multipliers"])
            self._tasks.append((each.values["theta"], factors * each.weight))
        self._hashes = dict(zip(self._config["tensors"], self._config["w0_checks"].split(), strict=True))
        self.w0_dtypes: Mapping[str, str] | None = self._config["w0_dtypes"]

    def _check_values(self, values: Mapping[str, Tensor], model: nn.Module, basis: Basis) -> None:
        check_value(values, "theta", [basis.plan.dim], torch.float32)
        check_value(values, "multipliers", [basis.partition.num_multipliers], torch.float32)
        for name in self.full:
            check_value(values, key_of(name), self._config["full"][name], None)
        buffers = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        Buffers(model).check("buffers", model, buffers)

    def w0_dtype(self, name: str) -> torch.dtype:
        """The dtype of this tensor of W0 in training."""
        assert self.w0_dtypes is not None
        found: torch.dtype = getattr(torch, self.w0_dtypes.get(name, self.w0_dtypes["*"]))
        return found

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the merged tensor `name`, a float one."""
        if (value := self._stored(name)) is not None:
            return value.dtype
        return self._given if self._given is not None and name in self.projected else self.w0_dtype(name)

    def find_dtypes(self, samples: Mapping[str, Tensor]) -> None:
        """Finds `w0_dtypes` by the hashes of W0, where the checkpoint does not say them, and checks W0 as `check`."""
        if self.w0_dtypes is None:
            dtype = self._config["dtype"]
            both = ["float32", dtype] if self._given is not None else [dtype, "float32"]
            fits = [each for each in both if not self._others(samples, {"*": each})]
            self.w0_dtypes = {"*": (fits or both)[0]}
        self.check(samples)

    def check(self, samples: Mapping[str, Tensor]) -> None:
        """Raises ValueError if W0 is not what was trained from.

        `samples` is {name: some values of a projected tensor, as `samples_of` gives them}.
        """
        assert self.w0_dtypes is not None
        if others := self._others(samples, self.w0_dtypes):
            names = ", ".join(map(repr, others[:3])) + (", ..." if len(others) > 3 else "")
            raise ValueError(
                f"model: expected the W0 from which {self._trained[0].where!r} was trained, got another one in "
                f"{len(others)} of {len(self.projected)} tensors ({names}), so their weights would not be the trained "
                "ones"
            )

    def _others(self, samples: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> list[str]:
        found = []
        for name, values in samples.items():
            values = values.to(getattr(torch, dtypes.get(name, dtypes["*"])))
            if w0_checks({name: values}) != self._hashes[name]:
                found.append(name)
        return found

    @torch.no_grad()
    def pieces(self, name: str, w0: Tensor | None) -> Iterator[Tensor]:
        """The values of the merged tensor, some at a time, one after another.

        `w0` is the tensor in the dtype of training; None if it is in no file.
        """
        if name in self.projected:
            assert w0 is not None
            yield from self._projected(name, w0)
            return
        value = self._stored(name)
        if name in self.full and [each.weight for each in self._trained] != [1]:
            value = self._sum_of_full(name, w0)
        value = w0 if value is None else value
        assert value is not None
        yield from value.reshape(-1).split(PIECE)

    def _projected(self, name: str, w0: Tensor) -> Iterator[Tensor]:
        part = Part(self._plan, [name])
        size, plan = w0.numel(), part.plan
        kept = {name: row for name, row in self._kept.items() if name in plan.shapes}
        *tasks, (theta, scaled) = self._tasks
        base = w0.float() if tasks else w0  # a sum is rounded once
        for before, factors in tasks:
            projection = Projection(plan, dtype=torch.float32, kept=kept)
            base = projection.flat(before, part.own(factors), [base])[:size].view(w0.shape)
        projection, own = Projection(plan, dtype=self.dtype(name), kept=kept), part.own(scaled)
        if is_whole(plan, name):
            for begin in range(0, size, PIECE):
                yield projection.some(theta, own, base, begin, min(begin + PIECE, size))
        else:
            yield projection.flat(theta, own, [base])[:size]

    def _stored(self, name: str) -> Tensor | None:
        """The tensor `name` in the checkpoint: one that was trained fully, or a buffer that training changed."""
        values = self._trained[0].values
        return values.get(key_of(name) if name in self.full else f"{PREFIX}{name}")

    def _sum_of_full(self, name: str, w0: Tensor | None) -> Tensor:
        """W0 plus the weighted sum of what each task has changed."""
        rest = 1 - sum(each.weight for each in self._trained)
        if w0 is None and abs(rest) > 1e-6:
            raise ValueError(
                f"weights: expected a sum of 1, because {name!r} was trained fully and its W0 is in no file, got "
                f"{1 - rest:g}"
            )
        value = torch.zeros(()) if w0 is None else rest * w0.float()
        for each in self._trained:
            value = value + each.weight * each.values[key_of(name)].float()
        return value.to(self.dtype(name))
