"""`Place`: what a module of a wrapped model knows of its wrapper; `Source`: what answers for the model's weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from hsaid_kernels.wrapper.w0.snapshot import Tree


class Source:
    """What reads and changes of a module are answered by. This one leaves the module as it is."""

    tables: Collection[str] = ()  # names of the tensors of which single rows are made
    others: set[str] = set()  # names of parameters that may be added to the model

    def read(self, name: str | None, parameter: nn.Parameter) -> Tensor:
        """The tensor of now for the parameter `name`, whose W0 is `parameter`; None if it is new in the model."""
        return parameter

    def quickly(self, name: str | None, parameter: nn.Parameter | None) -> Tensor | None:
        """What `read` gives, or None where this cannot be told quickly."""
        return parameter

    def table(self, name: str | None, parameter: nn.Parameter) -> object:
        """What a lookup of rows gets, in the place of the tensor."""
        return parameter

    def tree_changed(self) -> None:
        """Notes that a module or a parameter of the model has been replaced or added."""

    def owns(self, parameter: Tensor) -> bool:
        """Whether this is a parameter of the model, or a projected weight of one."""
        return True

    def check_set(self, call: str, own: nn.Parameter, value: Tensor, converted: bool = False) -> None:
        """Raises RuntimeError, with a message that begins with `call`, if `value` cannot take the place of `own`.

        `converted`: `own` may have been converted to the dtype of `value`.
        """

    def put_back(self, changed: nn.Module | None = None) -> None:
        """Gives modules, `changed` above all, what was taken out of them since they were last looked at."""

    def adopt(self, module: nn.Module, keys: Iterable[str]) -> None:
        """Answers reads of these attributes of a module that is new in the model, or tied to it, from now on."""

    def part_copy(self, module: nn.Module) -> nn.Module | None:
        """A plain copy of a module that is a part of the model, with the weights of now; None if it is the model."""
        return None

    def hear(self, module: nn.Module, call: str, frame: FrameType | None) -> None:
        """Notes a call, made at `frame`, that acts on W0, and may have been meant for theta."""


class Place:
    """What a module of a wrapped model knows of its wrapper, as its attribute `_hsaid`.

    source  answers the module's reads
    names   {attribute: name of the parameter in the model}
    tables  attributes that only embeddings have, and of which `source` makes single rows
    masks   {attribute: torch.nn.utils.prune's hook}, for masked weights, which prune stores as ordinary attributes
    graph   {attribute: tensor} while the module runs compiled (`compiled.py`), else None
    tree    of the model itself: what it looked like when it was last looked at, else None
    before  {attribute: tensor} of what hooks have computed from a parameter and stored in the module, such as
            weight_norm's `weight`, computed from `weight_g` and `weight_v`
    """

    def __init__(self, source: Source):
        self.source = source
        self.names: dict[str, str | None] = {}
        self.tables: frozenset[str] = frozenset()
        self.masks: dict[str, BasePruningMethod] = {}
        self.graph: dict[str, Tensor] | None = None
        self.tree: Tree | None = None
        self.before: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None, "tree": None}


def place_of(module: nn.Module) -> Place | None:
    return module.__dict__.get("_hsaid")


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's own class, without the properties of `reads.attach`."""
    return next(kind for kind in type(module).__mro__ if "_hsaid_keys" not in kind.__dict__)
