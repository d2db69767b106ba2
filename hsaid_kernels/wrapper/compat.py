"""The interfaces of two published implementations, on top of `HSAID`.

These are the functions of rabeehk/compacter and the class of jgamper/intrinsic-dimensionality. Training code written
for them runs after changing the import. docs/migrating.md lists the differences and the reasons.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

from hsaid_kernels.wrapper.checkpoint.compare import check_state
from hsaid_kernels.wrapper.hsaid import HSAID
from hsaid_kernels.wrapper.reads.properties import class_for
from hsaid_kernels.wrapper.tasks import key_of
from hsaid_kernels.wrapper.w0.kinds import kind_of
from hsaid_kernels.wrapper.w0.quantized import check_known
from hsaid_kernels.wrapper.w0.stored import is_adapted

if TYPE_CHECKING:
    from typing_extensions import Self

Model = TypeVar("Model", bound=nn.Module)

NAMES = {"intrinsic_parameter": "theta", "intrinsic_parameter_said": "multipliers"}  # {published name: name in HSAID}


def intrinsic_dimension(
    module: Model,
    intrinsic_dimension: int,
    output_dir: str | os.PathLike[str] | None,
    str_filter: Collection[str],
    projection: str,
    device: torch.device | str | int = "cpu",
    *,
    seed: int = 0,
    width: int | None = None,
) -> Model:
    """Puts `module` itself into a random subspace (DID), in place, and returns it.

    Args:
        module: the module to train. Calling it or its `generate` then uses the projected weights. The projected
            parameters become W0: they are frozen and never written.
        intrinsic_dimension: d, the number of trained values.
        output_dir: ignored, as in the original.
        str_filter: strings. Of the parameters that require gradients, those with one of these strings in their name are
            projected, or all if the set is empty. The others that require gradients are trained directly and do not
            count towards d.
        projection: "fastfood".
        device: the device to which the module and its new parameters are moved.
        seed: 0 to 2**64 - 1. Determines the random basis.
        width: that of `Plan`.

    The module gets two attributes: `intrinsic_parameter`, an nn.Parameter, float32 [d], initially zeros; and `hsaid`,
    the `HSAID` that runs it. Use `module.hsaid.save_pretrained` for checkpoints of a few kilobytes and
    `module.hsaid.merge()` for an ordinary model.

    Raises:
        TypeError: `module` is not a module, `str_filter` is not a collection of strings (a single string is not
            accepted), or a parameter cannot be projected.
        ValueError: no parameter is selected, `projection` is not "fastfood", the module is or contains a module that is
            already in a subspace, or HSAID raises it.
    """
    return _put_into_subspace(module, intrinsic_dimension, "did", str_filter, projection, device, seed, width)


def intrinsic_dimension_said(
    module: Model,
    intrinsic_dimension: int,
    output_dir: str | os.PathLike[str] | None,
    str_filter: Collection[str],
    projection: str,
    device: torch.device | str | int = "cpu",
    *,
    seed: int = 0,
    width: int | None = None,
) -> Model:
    """Like `intrinsic_dimension`, but with a multiplier for each of the m projected tensors (SAID).

    The module also gets `intrinsic_parameter_said`, an nn.Parameter, float32 [m], initially ones, in the order of
    `named_parameters()`. `intrinsic_parameter` then has d - m values. Raises ValueError also for d <= m.
    """
    return _put_into_subspace(module, intrinsic_dimension, "said", str_filter, projection, device, seed, width)


class FastfoodWrap(HSAID):
    """An `HSAID` with partition "did", normalize="tensor", chunks="all" and padding_rows={}, called as the original is.

    Args:
        module: a module. Its parameters that require gradients are projected; the others are frozen.
        intrinsic_dimension: d, the number of trained values.
        device: the device to which the module and theta are moved.
        seed: 0 to 2**64 - 1. Determines the random basis.
        width: that of `Plan`.

    Attributes: V is theta, an nn.Parameter, float32 [d]; m is a list that contains only the module. Raises as `HSAID`.
    """

    def __init__(
        self,
        module: nn.Module,
        intrinsic_dimension: int,
        device: torch.device | str | int = 0,
        *,
        seed: int = 0,
        width: int | None = None,
    ):
        include, _ = _choice(module, ())
        as_published: dict[str, Any] = dict(normalize="tensor", chunks="all", padding_rows={})
        super().__init__(module, intrinsic_dimension, "did", seed, include=include, width=width, **as_published)
        self.to(device)

    # Returns an HSAID, because a checkpoint has more options than this class.
    from_pretrained = HSAID.from_pretrained  # type: ignore[assignment]

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
    width: int | None,
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
    torch.empty(0, device=device)  # raises for an unavailable device before anything is changed
    options: dict[str, Any] = dict(include=include, train_fully=train_fully, width=width)
    options |= dict(normalize="tensor", chunks="all", padding_rows={})
    hsaid = _InPlace(module, dim, partition, seed, **options)
    _carry(module, hsaid)
    return module.to(device)


def _carry(module: nn.Module, hsaid: HSAID) -> None:
    """Attaches to a module the HSAID that runs it: replaces its class, and registers theta and the multipliers."""
    module.__class__ = _class_in_subspace(type(module))  # type: ignore[arg-type]  # classes are hashable
    module.__dict__["hsaid"] = hsaid  # not as a submodule, because the HSAID in turn refers to the module
    for name, own in NAMES.items():
        if (parameter := getattr(hsaid, own)).numel():  # DID has no multipliers
            hsaid._source.attachment.others.add(name)
            module.register_parameter(name, parameter)


def _choice(module: nn.Module, str_filter: Collection[str]) -> tuple[list[str] | None, list[str]]:
    """The arguments (include, train_fully) of HSAID that select what the originals project and train fully."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    # A string is also a collection of strings: it would select the names that contain any of its letters.
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
    if taken == names:
        return None, others
    if not str_filter:  # HSAID takes what is given to `include` for the caller's own choice
        quantized = [] if is_adapted(module) else [inner for inner in module.modules() if kind_of(inner) is not None]
        if quantized:
            raise TypeError(
                f"module: expected float weights, got a {type(quantized[0]).__name__}: HSAID(module, d, memory='block')"
                " trains a quantized model"
            )
        check_known(module)
    return include, others


class _InPlace(HSAID):
    """The HSAID of a module in a subspace. Its fully trained parameters are the model's own, not copies."""

    _own_full = True

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
        return merged

    def unwrap(self) -> nn.Module:
        module = super().unwrap()
        if isinstance(module, _InSubspace):
            del module.hsaid
            for name in NAMES:
                module._parameters.pop(name, None)
            module.__class__ = _plain_class(module)  # type: ignore[assignment]
        return module

    def unwrapped(self) -> NoReturn:
        raise RuntimeError(
            "unwrapped(): expected an HSAID, got a module in a subspace: unwrap() it for good, or merge()"
        )

    def add_task(self, name: str) -> None:
        raise RuntimeError(
            "add_task(): the model has one intrinsic_parameter; for more tasks wrap a plain one in HSAID"
        )

    def _checked(self) -> None:
        self._share()  # load_state_dict(assign=True) or a new head may have replaced the model's parameters
        super()._checked()

    def _share(self) -> None:
        model = dict(self.model.named_parameters())
        self._parameters.update({key_of(name): model[name] for name in self.full})


class _InSubspace(nn.Module):
    """The first base class of a module in a subspace; the second one is the module's original class."""

    hsaid: HSAID
    _hsaid_keys: tuple[str, ...]  # of the second base class, see `reads.class_for`

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # An ordinary module, so that type(module).from_pretrained(...) returns one.
        return _plain_class(cls)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.hsaid._computing():
            return super().__call__(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name in NAMES:  # attribute assignment and load_state_dict(assign=True) also end up here
            self.hsaid.register_parameter(NAMES[name], param)

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.hsaid._source.drop_cache()  # as in HSAID.train, which cannot be called: it would call this method
        return super().train(mode)

    def get_extra_state(self) -> Tensor:
        return self.hsaid.get_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: `_load_from_state_dict` has already checked the configuration."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (key := f"{prefix}_extra_state") in state_dict:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about another W0: this state_dict contains W0 itself
                check_state(state_dict[key], self.hsaid.configuration())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.hsaid._apply(fn, recurse=False)  # keeps theta and the multipliers in float32
        held = {name: getattr(self.hsaid, own) for name, own in NAMES.items() if name in self._parameters}
        for name in held:
            del self._parameters[name]
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters.update(held)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # pickle looks a class up by its name, but this class is created at run time.
        return _blank, (_plain_class(self), type(self)._hsaid_keys), *super().__reduce_ex__(protocol)[2:]


@functools.cache
def _class_in_subspace(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of modules in a subspace: a subclass of _InSubspace and `cls`, with the name of `cls`."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    metaclass: type = type(cls)
    own = metaclass(cls.__name__, (_InSubspace, cls), names)
    if hasattr(cls, "generate"):
        # generate() itself needs no gradients, and weights computed without gradients are cached for the next call.
        @torch.no_grad()
        @functools.wraps(cls.generate)
        def generate(self: _InSubspace, *args: Any, **kwargs: Any) -> Any:
            with self.hsaid._computing():
                return cls.generate(self, *args, **kwargs)

        own.generate = generate
    return own


def _plain_class(module: nn.Module | type[nn.Module]) -> type[nn.Module]:
    cls = module if isinstance(module, type) else type(module)
    return next(kind for kind in cls.__bases__[1].__mro__ if "_hsaid_keys" not in kind.__dict__)


def _blank(cls: type[nn.Module], keys: tuple[str, ...]) -> nn.Module:
    reading: Any = class_for(cls, keys, False)  # type: ignore[arg-type]  # classes are hashable
    return object.__new__(_class_in_subspace(reading))
