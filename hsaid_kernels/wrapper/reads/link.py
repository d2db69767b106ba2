"""`Link`: what a module of a wrapped model knows of its wrapper, which answers reads and hears of changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import FrameType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from hsaid_kernels.wrapper.w0.snapshot import Snapshot


class Source(Protocol):
    """Where the weights of now come from. `weights.source.WeightSource` implements it."""

    @property
    def tables(self) -> Collection[str]:
        """Names of the tensors of which single rows are made."""

    def read(self, name: str | None, parameter: nn.Parameter) -> Tensor:
        """The tensor of now for the parameter `name`, whose W0 is `parameter`; None if it is new in the model."""

    def quickly(self, name: str | None, parameter: nn.Parameter | None) -> Tensor | None:
        """What `read` gives, or None where this cannot be told quickly."""

    def table(self, name: str | None, parameter: nn.Parameter) -> object:
        """What a lookup of rows gets, in the place of the tensor."""

    def rows(self, name: str, parameter: nn.Parameter, rows: Tensor) -> Tensor:
        """Rows [U, D] of a tensor of `tables`, for U different numbers in rising order."""

    def part_copy(self, module: nn.Module) -> nn.Module | None:
        """A plain copy of a module that is a part of the model, with the weights of now; None if it is the model."""

    def hear(self, module: nn.Module, call: str, frame: FrameType | None) -> None:
        """Notes a call, made at `frame`, that acts on W0, and may have been meant for theta."""


class Changes(Protocol):
    """What hears of changes in the model. `weights.attachment.Attachment` implements it."""

    others: set[str]  # names of parameters that may be added to the model

    def note_change(self) -> None:
        """Notes that a module or a parameter of the model has been replaced or added."""

    def owns(self, parameter: object) -> bool:
        """Whether this is a parameter of the model, or a projected weight of one."""

    def check_set(self, call: str, own: nn.Parameter, value: Tensor, converted: bool = False) -> None:
        """Raises, with a message that begins with `call`, if `value` cannot take the place of `own`.

        `converted`: `own` may have been converted to the dtype of `value`.
        """

    def put_back(self, changed: nn.Module | None = None) -> None:
        """Gives modules, `changed` above all, what was taken out of them since they were last looked at."""

    def adopt(self, module: nn.Module, keys: Iterable[str]) -> None:
        """Answers reads of these attributes of a module that is new in the model, or tied to it, from now on."""


class Link:
    """What a module of a wrapped model knows of its wrapper, stored as `module.__dict__["_hsaid"]`.

    Attributes:
        source: answers reads of the module's weights.
        changes: hears of what is put into the module and taken out of it.
        names: {attribute: name of the parameter in the model}, the attributes whose reads `source` answers.
        tables: those of `names` that only embeddings hold, and of which `source` makes single rows.
        masks: {attribute: torch.nn.utils.prune's hook}, of masked weights, which prune stores as ordinary attributes.
        graph: {attribute: tensor} while the module runs compiled (compiled_layers.py), else None.
        snapshot: on the root module only: what the model looked like when it was last looked at.
        before: {attribute: tensor} of what hooks had computed from parameters and stored in the module, such as
            weight_norm's `weight`, to be put back by `detach`.
    """

    def __init__(self, source: Source, changes: Changes):
        self.source, self.changes = source, changes
        self.names: dict[str, str | None] = {}
        self.tables: frozenset[str] = frozenset()
        self.masks: dict[str, BasePruningMethod] = {}
        self.graph: Mapping[str, Tensor] | None = None
        self.snapshot: Snapshot | None = None
        self.before: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None, "snapshot": None}


def link_of(module: nn.Module) -> Link | None:
    return module.__dict__.get("_hsaid")


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's own class, without the properties of `properties.attach`."""
    return next(kind for kind in type(module).__mro__ if "_hsaid_keys" not in kind.__dict__)
