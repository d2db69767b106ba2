"""The published interfaces on these kernels: rabeehk/compacter's functions, jgamper/intrinsic-dimensionality's wrapper.

Training code written for them runs once its import is changed. What differs, and why: docs/migrating.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.comparison import check_state
from hsaid_kernels.wrapper.hsaid import HSAID

if TYPE_CHECKING:
    from typing_extensions import Self

Model = TypeVar("Model", bound=nn.Module)

NAMES = {"intrinsic_parameter": "theta", "intrinsic_parameter_said": "multipliers"}  # there, here


def intrinsic_dimension(
    module: Model,
    intrinsic_dimension: int,
    output_dir: str | os.PathLike[str] | None,
    str_filter: Collection[str],
    projection: str,
    device: torch.device | str | int = "cpu",
    *,
    seed: int = 0,
) -> Model:
    """Puts `module` itself into a random subspace (DID) and returns it.

    Args:
        module: calling it, and its `generate`, run on the projected weights. The parameters that take part become W0:
            frozen, and never written.
        intrinsic_dimension: d, the number of trained values.
        output_dir: not used, as in the original.
        str_filter: of the parameters that require gradients, those with one of these strings in their name take part;
            of an empty set, all. The others stay as they are: what requires gradients is trained as it is, beside d.
        projection: "fastfood".
        device: where the module goes, and what it gets here.
        seed: 0 to 2**64 - 1; decides the random basis.

    The module gets `intrinsic_parameter`, float32 [d], zeros, and `hsaid`, the `HSAID` that runs it: for checkpoints of
    a few kilobytes (`module.hsaid.save_pretrained`), for an ordinary model (`module.hsaid.merge()`), and for any other
    method on the projected weights (`module.hsaid.encode(...)`): called on the module or on a submodule it finds W0.

    Raises:
        TypeError: module is no module, str_filter no collection of strings, or a parameter cannot be projected.
        ValueError: nothing takes part, another projection, a module in a subspace already, or what HSAID refuses.
    """
    return _put_into_subspace(module, intrinsic_dimension, "did", str_filter, projection, device, seed)


def intrinsic_dimension_said(
    module: Model,
    intrinsic_dimension: int,
    output_dir: str | os.PathLike[str] | None,
    str_filter: Collection[str],
    projection: str,
    device: torch.device | str | int = "cpu",
    *,
    seed: int = 0,
) -> Model:
    """As `intrinsic_dimension`, with a multiplier for each of the m tensors that take part (SAID).

    The module gets `intrinsic_parameter_said` too, float32 [m], ones, in the order of `named_parameters()`;
    `intrinsic_parameter` has d - m values.
    """
    return _put_into_subspace(module, intrinsic_dimension, "said", str_filter, projection, device, seed)


class FastfoodWrap(HSAID):
    """`HSAID(module, intrinsic_dimension, "did")` with the arguments of the original and its attributes V and m.

    Args:
        module: its parameters that require gradients are projected, the others are frozen.
        intrinsic_dimension: d, the number of trained values.
        device: where the module goes, and theta.
        seed: 0 to 2**64 - 1; decides the random basis.
    """

    def __init__(
        self, module: nn.Module, intrinsic_dimension: int, device: torch.device | str | int = 0, *, seed: int = 0
    ):
        include, _ = _choice(module, ())
        super().__init__(module, intrinsic_dimension, "did", seed, include=include)
        self.to(device)

    from_pretrained = HSAID.from_pretrained  # makes an HSAID: a checkpoint has more to say than these arguments

    @property
    def V(self) -> nn.Parameter:
        return self.theta

    @property
    def m(self) -> list[nn.Module]:
        return [self.model]


def _put_into_subspace(
    module: Model,
    dim: int,
    partition: str,
    str_filter: Collection[str],
    projection: str,
    device: torch.device | str | int,
    seed: int,
) -> Model:
    if projection != "fastfood":
        raise ValueError(
            f"projection: expected 'fastfood', got {projection!r}; 'random' would be a dense matrix, d values to keep "
            "for every weight"
        )
    if isinstance(module, nn.Module) and any(isinstance(inner, _InSubspace) for inner in module.modules()):
        raise ValueError(
            f"module: expected one as it was made, got a {type(module).__name__} that is, or holds, one in a subspace "
            "already: take a fresh one, or module.hsaid.merge()"
        )
    include, train_fully = _choice(module, str_filter)
    torch.empty(0, device=device)  # which fails before anything is changed where there is no such device
    hsaid = _InPlace(module, dim, partition, seed, include=include, train_fully=train_fully)
    for w0 in hsaid.w0().values():
        w0.requires_grad_(False)
    _carry(module, hsaid)
    return module.to(device)


def _carry(module: nn.Module, hsaid: HSAID) -> None:
    """Puts the HSAID that runs a module into it."""
    module.__class__ = _class_in_subspace(type(module))  # type: ignore[arg-type]  # classes are hashable
    module.__dict__["hsaid"] = hsaid  # not as a submodule: the module would be its own
    for name, own in NAMES.items():
        if (parameter := getattr(hsaid, own)).numel():  # DID has no multipliers
            module.register_parameter(name, parameter)


def _choice(module: nn.Module, str_filter: Collection[str]) -> tuple[list[str] | None, list[str]]:
    """What the originals project and what they leave trainable, as `include` and `train_fully` of HSAID."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    # Of a string, which is a collection of strings too, every letter would be looked for.
    if isinstance(str_filter, str) or not all(isinstance(part, str) for part in str_filter):
        raise TypeError(f"str_filter: expected a set of strings, got {str_filter!r}")
    names = [name for name, _ in module.named_parameters()]
    trainable = [name for name in names if module.get_parameter(name).requires_grad]
    taken = [name for name in trainable if not str_filter or any(part in name for part in str_filter)]
    if not taken:
        raise ValueError(
            f"str_filter: expected {set(str_filter) or 'all'} to choose among the parameters that require gradients, "
            f"got none of the {len(trainable)} (of {len(names)}) in a {type(module).__name__}"
        )
    include, others = (
        [f"^{re.escape(name)}$" for name in trainable if (name in taken) is whether] for whether in (True, False)
    )
    return None if taken == names else include, others


class _InPlace(HSAID):
    """An HSAID that its model carries, and that trains the model's own parameters where these are trained fully."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._share()

    def merge(self, inplace: bool = False) -> nn.Module:
        if inplace:
            raise ValueError(
                "inplace: expected False, got True, but the model's own state_dict is to have W0 and theta"
            )
        merged = super().merge()
        del merged.hsaid
        for name in NAMES:
            merged._parameters.pop(name, None)
        merged.__class__ = _plain_class(merged)
        for name in self.plan.names:
            merged.get_parameter(name).requires_grad_(True)  # as before it was W0
        return merged

    def add_task(self, name: str) -> None:
        raise RuntimeError(
            "add_task(): the model has one intrinsic_parameter; for more tasks wrap a plain one in HSAID"
        )

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with self._projected.lock:
            self._share()  # the model may have got others, by load_state_dict(assign=True) or a new head
            with super()._computing():
                yield

    def _share(self) -> None:
        own = {id(held): self.model.get_parameter(name) for name, held in self.full.items()}
        for key, held in list(self.named_parameters()):
            if id(held) in own:
                self.register_parameter(key, own[id(held)])


class _InSubspace(nn.Module):
    """What the class of a module in a subspace has in front of the module's own class."""

    hsaid: HSAID

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _plain_class(cls)(*args, **kwargs)  # type(module).from_pretrained(...) makes an ordinary one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hsaid._computing():
            return super().__call__(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name in NAMES:  # also by assignment and load_state_dict(assign=True)
            self.hsaid.register_parameter(NAMES[name], param)

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.hsaid._projected.drop_cache()  # as HSAID.train, which would call this again
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        return self.hsaid.get_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (key := f"{prefix}_extra_state") in state_dict:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of another W0: this state_dict brings its own
                check_state(state_dict[key], self.hsaid)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.hsaid._apply(fn, recurse=False)  # which keeps theta and the multipliers in float32
        held = {name: getattr(self.hsaid, own) for name, own in NAMES.items() if name in self._parameters}
        for name in held:
            del self._parameters[name]
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters.update(held)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # A pickle finds a class by its name, and this one was made at run time.
        return _blank, (_plain_class(self),), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def _class_in_subspace(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class, under the same name, for one in a subspace."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    metaclass: type = type(cls)
    own = metaclass(cls.__name__, (_InSubspace, cls), names)
    if hasattr(cls, "generate"):

        @torch.no_grad()  # as in the method itself: weights made without gradients are kept for the next call
        @functools.wraps(cls.generate)
        def generate(self: _InSubspace, *args: Any, **kwargs: Any) -> Any:
            with self.hsaid._computing():
                return cls.generate(self, *args, **kwargs)

        own.generate = generate
    return own


def _plain_class(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    cls = module if isinstance(module, type) else type(module)
    return cls.__bases__[1]


def _blank(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(_class_in_subspace(cls))  # type: ignore[arg-type]  # classes are hashable
