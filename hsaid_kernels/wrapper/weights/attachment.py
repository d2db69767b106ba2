"""`WatchedModel`: a model whose reads are answered by its subclass. Notices changes, and gives the model back."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.fastfood.selection import ON_META
from hsaid_kernels.wrapper.checkpoint.compare import differences
from hsaid_kernels.wrapper.merging import merged_copy
from hsaid_kernels.wrapper.reads.compiled_layers import compiled_as_before, keep_compiled_current
from hsaid_kernels.wrapper.reads.hearing import AT_ONCE, warn
from hsaid_kernels.wrapper.reads.link import Source, place_of
from hsaid_kernels.wrapper.reads.properties import attach, detach
from hsaid_kernels.wrapper.reads.registration import watch_registrations
from hsaid_kernels.wrapper.w0.beside import Buffers
from hsaid_kernels.wrapper.w0.checks import check_hooks
from hsaid_kernels.wrapper.w0.fsdp2 import Ranks, check_sharding, is_gathered, is_sharded
from hsaid_kernels.wrapper.w0.quantized import is_quantized, whole
from hsaid_kernels.wrapper.w0.snapshot import Tree, forget_derived, masks
from hsaid_kernels.wrapper.weight import Weight, is_given


class WatchedModel(Source):
    """A wrapped model.

    Args:
        model: the model whose parameters are W0.
        plan: its projected tensors.
        full: names of the fully trained tensors.
        own_full: whether these are the model's own parameters, and not copies.

    Attributes:
        kept: {name: W0_i} while the model holds the projected weights (`merge`), else None.
        flags: {name: requires_grad before the model was wrapped}. W0 does not require gradients while it is wrapped, so
            that neither an optimizer nor DistributedDataParallel around a larger module take it for trained.
        others: names of parameters that are in the model since, and belong there.
        attached: whether the model is wrapped.
        buffers: the model's buffers as they were before it was wrapped.
        ranks: those that have shards of the model, where FSDP2 has sharded it, else None.
        owner: a weak reference to the HSAID. The model refers to this object, and this object to theta, but not to the
            HSAID, so that `del hsaid` frees the model for another one.
    """

    owner: weakref.ref[nn.Module] | None
    memory: str = "step"
    steps: int
    merged_task: str  # whose weights the model holds, between merge and unmerge
    lock: threading.RLock

    def __init__(self, model: nn.Module, plan: Plan, full: Collection[str], own_full: bool):
        tree = Tree(model)
        self._model = weakref.ref(model)
        self.plan, self._full_names, self.own_full = plan, frozenset(full), own_full
        self._aliases, self._own = tree.aliases, tree.parameters
        self.flags = {name: parameter.requires_grad for name, parameter in tree.parameters.items()}
        self.others: set[str] = set()
        self.ranks: Ranks | None = None
        self.kept: dict[str, Tensor] | None = None
        self.attached = False
        self.buffers = Buffers(model)

    def _start(self) -> None:
        """Makes what is not copied with this object."""
        watch_registrations()
        self.owner = None
        self.lock = threading.RLock()
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that are tied to the model, or in it since
        self._accepted = WeakTensorKeyDictionary()  # that were set when this changed nothing
        self._heard: Any = None  # theta's state when W0 was last asked for
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("owner", "lock", "_modules", "_adopted", "_accepted", "_heard", "_warned")
        state = {key: value for key, value in self.__dict__.items() if key not in made_again}
        return state | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        self.__dict__.update(state | {"_model": weakref.ref(nn.Module() if model is None else model)})
        self._start()

    def drop_cache(self) -> None:
        """Discards what reads are answered by, so that the next read makes it again."""
        raise NotImplementedError

    def thetas(self) -> list[Tensor]:
        """Those of all tasks."""
        raise NotImplementedError

    def trained(self, key: str) -> nn.Parameter:
        """theta, the multipliers or a fully trained tensor of this thread's task, as the HSAID has it now."""
        raise NotImplementedError

    def now(self) -> dict[str, Tensor]:
        """{name: projected weight}."""
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        """The wrapped model. Not kept alive from here: its modules refer to this object, and would make a circle."""
        model = self._model()
        if model is None:
            raise RuntimeError("model: expected the one that was wrapped to be in use, but it is gone")
        return model

    def belongs_to(self, owner: nn.Module) -> None:
        """Notes whose weights these are. Raises ValueError if they are another HSAID's, as after copy.copy()."""
        if self.owner is not None and self.owner() not in (None, owner):
            raise ValueError(
                "model: expected one that no HSAID wraps, got that of the HSAID which was copied: deepcopy it"
            )
        self.owner = weakref.ref(owner)

    def attach(self) -> None:
        """From now on, reads of the model's weights are answered here."""
        self.attached = True
        try:
            self._scan()
        except Exception:  # such as a module whose class cannot be replaced
            self.detach()
            raise
        forget_derived(self.model)

    def detach(self) -> None:
        """Gives back the plain model: its classes, W0, its buffers, and whether its parameters require gradients."""
        if self.kept is not None:
            self.unmerge()
        self.attached = False
        self.drop_cache()
        if self.ranks is not None:
            self.ranks.release()
            self.ranks = None
        self.put_back()
        tree = Tree(self.model)
        for module in {self.model, *tree.modules, *self._modules, *self._adopted}:
            compiled_as_before(module)
            detach(module)
        self._modules.clear()
        self._adopted.clear()
        self._give_flags_back(self._own)
        self._give_flags_back(tree.parameters)
        self.buffers.put(self.model, {})
        forget_derived(self.model)

    def _give_flags_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if self.flags.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad_(self.flags[name])

    def tree_changed(self) -> None:
        if (model := self._model()) is not None and (place := place_of(model)) is not None:
            place.tree = None

    def owns(self, parameter: Tensor) -> bool:
        own = parameter.w0 if isinstance(parameter, Weight) else parameter
        return any(own is known for known in self._own.values())

    def adopt(self, module: nn.Module, keys: Iterable[str]) -> None:
        self._adopted.add(module)
        place = place_of(module)
        known: Mapping[str, str | None] = {} if place is None else place.names
        attach(module, self, {**known, **dict.fromkeys(keys)}, {})

    def put_back(self, changed: nn.Module | None = None) -> None:
        model = self._model()
        if model is None or (place := place_of(model)) is None or place.tree is None:
            return
        place.tree.put_back(changed)
        for module in (model, *place.tree.modules):
            if (own := place_of(module)) is not None:
                module.__dict__.update({key: own.before[key] for key in own.before.keys() - module.__dict__.keys()})

    def check_set(self, call: str, own: nn.Parameter, value: Tensor, converted: bool = False) -> None:
        value = value.w0 if isinstance(value, Weight) else value
        name = next((name for name, known in self._own.items() if known is own), None)
        if value is own or name is None or self.own_full or self.kept is not None:
            return
        if self.owns(value):
            raise ValueError(
                f"{call}: expected {name!r} to stay while an HSAID wraps the model, got another parameter of it, to "
                "which it would be tied: unwrap() it first"
            )
        if value.is_meta and not own.is_meta:
            raise RuntimeError(
                f"{call}: expected {name!r} to keep its values, got a tensor on the meta device, {ON_META}, and "
                "unwrap() the model first"
            )
        if is_quantized(value) and not is_quantized(own):
            self._check_memory(name)
        if name in self._full_names and not _equal(own, value, converted):
            raise RuntimeError(
                f"{call}: expected {name!r} to stay, which is trained fully: write to hsaid.full[{name!r}]"
            )
        if name in self.plan.shapes and not is_sharded(own) and self._moved() and not _equal(own, value, converted):
            raise RuntimeError(
                f"{call}: expected {name!r} to stay, because a projected weight is W0 + P theta: what is set would "
                "become W0, and P theta would be added once more: write to W0 (hsaid.w0()), or change the model in "
                "hsaid.unwrapped()"
            )
        self._accepted[value] = True

    def _moved(self) -> bool:
        """Whether theta of any task moves any weight."""
        return any(bool(whole(theta.detach()).any()) for theta in self.thetas())

    @torch.no_grad()
    def part_copy(self, module: nn.Module) -> nn.Module | None:
        if module is self._model() or not self.attached:
            return None
        own, names = dict(module.named_parameters()), {id(p): name for name, p in self.own().items()}
        inside = {key: names[id(parameter)] for key, parameter in own.items() if id(parameter) in names}
        now = {key: self.read(name, own[key]).detach() for key, name in inside.items()}
        return merged_copy(module, own, now, {key: self.flags[name] for key, name in inside.items()})

    def hear(self, module: nn.Module, call: str, frame: FrameType | None) -> None:
        if self._warned or not self.attached or self.kept is not None or self.own_full:
            return
        if call in (*AT_ONCE, "state_dict()") and module is not self._model():
            return
        if call not in AT_ONCE:
            before, theta = self._heard, self.trained("theta")
            self._heard = (theta, None if theta.is_inference() else theta._version, self.steps)
            if before is None or (before[0] is theta and before[1:] == self._heard[1:]):
                return
        self._warned = True
        acts = {"zero_grad()": "zero_grad() acts on", "save_pretrained()": "save_pretrained() saves"}
        warn(acts.get(call, f"{call} gives"), frame)

    def heard_optimizer(self) -> None:
        """Warns that an optimizer trains W0 in the place of theta."""
        if not self._warned and self.attached and not self.own_full:
            self._warned = True
            warn("an optimizer has", None)

    def _scan(self) -> Tree:
        """Looks at the model again. Raises ValueError if it has other tensors than when it was wrapped."""
        model = self.model
        for module in model.modules():
            if (place := place_of(module)) is None or place.source is not self:
                attach(module, self, {}, {})
        masked: dict[nn.Module, dict[str, Any]] = defaultdict(dict)
        tree = Tree(model)
        names = tree.names()
        given = {name: self._own[name] for name, p in tree.parameters.items() if is_given(p) and name in self._own}
        tree.parameters |= given  # inside torch.func.functional_call
        for name in (name for name in self.plan.names if name in tree.parameters):
            before, now = self._own[name], tree.parameters[name]
            if now is not before and now not in self._accepted and not is_sharded(now) and now.shape == before.shape:
                self.check_set("model", before, now, converted=True)
        if untied := sorted(self._aliases.keys() & tree.parameters.keys()):
            raise ValueError(
                f"model: expected {untied[0]!r} to be tied as it was when it was wrapped, got one of its own"
            )
        self._look_at_shards(tree.parameters)
        tree.sharded = self.ranks is not None
        shapes = {name: tuple(tree.parameters[name].shape) for name in self.plan.names if name in tree.parameters}
        found = [name for name in tree.parameters if name not in self.flags and name not in self.others]
        missing = [name for name in self.flags if name not in tree.parameters]
        if shapes != self.plan.shapes or found or missing:
            expected = dict.fromkeys(self.flags, ()) | self.plan.shapes
            got = {name: tuple(p.shape) if name in self.plan.shapes else () for name, p in tree.parameters.items()}
            reason = differences(expected, {name: got[name] for name in got if name not in self.others})
            raise ValueError(
                f"model: expected the tensors that it had when it was wrapped, got others: {reason}; unwrap() the "
                "model before changing it"
            )
        for module, hook in masks([model, *tree.modules]):
            masked[module][hook._tensor_name] = hook
        answered = self.plan.shapes.keys() | (frozenset() if self.own_full else self._full_names)
        for module in (model, *tree.modules):
            own = {key: names[id(p)] for key, p in module._parameters.items() if p is not None}
            attach(module, self, {key: name for key, name in own.items() if name in answered}, masked[module])
        for name, parameter in tree.parameters.items():
            if parameter.requires_grad and name in self.flags and not (self.own_full and name in self._full_names):
                parameter.requires_grad_(False)
        for module in set(self._modules) - {model, *tree.modules}:  # which have left the model
            compiled_as_before(module)
            detach(module)
        self._modules = weakref.WeakSet((model, *tree.modules))
        here = {id(parameter) for parameter in tree.parameters.values()}
        left = {name: parameter for name, parameter in self._own.items() if id(parameter) not in here}
        self._give_flags_back({n: p for n, p in left.items() if not is_gathered(tree.parameters.get(n), p)})
        place = place_of(model)
        assert place is not None
        place.tree = tree
        self._own = tree.parameters
        return tree

    def _look_at_shards(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Notes whether FSDP2 has sharded the model. Raises as `check_sharding`; ValueError if memory is "step"."""
        check_sharding(parameters)
        quantized = [name for name in self.plan.names if is_quantized(parameters.get(name, self._own[name]))]
        if quantized:
            self._check_memory(quantized[0])
        shard = next(filter(is_sharded, parameters.values()), None)
        if shard is None or self.ranks is not None:
            return
        if self.memory != "block":
            raise ValueError(
                f'memory: expected "block" for a model that FSDP2 (fully_shard) has sharded, whose parameters are '
                f"gathered block by block, got {self.memory!r}"
            )
        self.ranks = Ranks(shard)

    def _check_memory(self, quantized: str) -> None:
        if self.memory != "block":
            raise ValueError(
                f'memory: expected "block" for a quantized model, which is dequantized block by block, got '
                f"{self.memory!r} ({quantized!r} is quantized): quantize the model first, and wrap it then with "
                'memory="block"'
            )

    def _verified(self) -> dict[str, nn.Parameter]:
        """The model's parameters. Raises if the model has changed in a way that would not be heard."""
        model = self._model()
        if model is None:  # somebody has kept a part of it
            return self._own
        place = place_of(model)
        tree = None if place is None or place.source is not self else place.tree
        if tree is None or not tree.holds():
            tree = self._scan()
        keep_compiled_current((model, *tree.modules))
        if self.ranks is not None:
            self.ranks.check_unchanged({name: tree.now(name) for name in self.plan.names})
        for name, parameter in tree.parameters.items():
            if (
                parameter.requires_grad
                and name in self.flags
                and name not in self.plan.shapes
                and name not in self._full_names
            ):
                raise RuntimeError(
                    f"model: expected {name!r} to stay frozen, because the HSAID leaves it out, got "
                    "requires_grad=True: unwrap() the model, and wrap it again"
                )
            if parameter._backward_hooks and name in self.flags and not self.own_full:
                check_hooks({name: parameter})
        return tree.parameters

    def snapshot(self) -> Tree:
        """The modules and parameters of the model, as they were when it was last verified."""
        place = place_of(self.model)
        if place is None or place.tree is None:
            self._verified()
            place = place_of(self.model)
        assert place is not None and place.tree is not None
        return place.tree

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors."""
        own: Mapping[str, Tensor] = self.own() if self.kept is None else self.kept
        return {name: own[name] for name in self.plan.names}

    def own(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name, where a tied parameter appears once."""
        with self.lock:
            return self._verified() if self.attached else dict(self.model.named_parameters())

    def known(self) -> dict[str, nn.Parameter]:
        """As `own`; of a model that has been changed so that it cannot be called, the parameters of before that."""
        try:
            return self.own()
        except (RuntimeError, ValueError, TypeError):
            return self._own

    def merge(self, values: Mapping[str, Tensor]) -> None:
        """Puts `values` into the model's own parameters of these names, until `unmerge`."""
        own = self.own()
        self.drop_cache()
        self.kept = {name: own[name].data for name in values}
        # Fully trained tensors are cloned, so that writes to the merged model do not change them.
        for name, value in values.items():
            own[name].data = value.data if name in self.plan.shapes else value.data.clone()
        forget_derived(self.model)

    def unmerge(self) -> None:
        """Restores the data that `merge` replaced. Raises RuntimeError if nothing is merged."""
        if self.kept is None:
            raise RuntimeError("unmerge(): expected weights that merge(inplace=True) has merged, found none")
        own = dict(self.model.named_parameters())
        for name, value in self.kept.items():
            own[name].data = value
        self.kept = None
        forget_derived(self.model)

    def check_on_w0(self, call: str) -> None:
        """Raises RuntimeError, which names `call`, after `unwrap` and while the model holds the projected weights."""
        if not self.attached:
            raise RuntimeError(
                f"{call}: expected an HSAID that wraps a model, got one after unwrap(): wrap the model again"
            )
        if self.kept is not None:
            raise RuntimeError(
                f"{call}: expected a model on its W0, got one that merge(inplace=True) has merged: unmerge()"
            )


def _equal(own: Tensor, value: Tensor, converted: bool) -> bool:
    """Whether `value` has the values of `own`; `converted`: what becomes of them in its dtype."""
    if own.shape != value.shape or own.is_meta or value.is_meta:
        return False
    now, new = whole(own.detach()), whole(value.detach())
    if converted:
        now = now.to(new)
    else:
        new = new.to(now)
    return bool(((now == new) | (now.isnan() & new.isnan())).all())


def unwrapped_before(model: nn.Module, owner: nn.Module) -> None:
    """Frees a model for a new HSAID, `owner`. Raises ValueError if another HSAID wraps it, or a part of it."""
    sources = {}
    for name, module in model.named_modules():
        place = place_of(module)
        if place is not None and isinstance(place.source, WatchedModel):
            sources[id(place.source)] = place.source
            other = place.source.owner and place.source.owner()
            if other is not None and other is not owner:
                what = f"its {name!r} already is" if name else f"a {type(module).__name__} that already is"
                raise ValueError(
                    f"model: expected one that no HSAID wraps, got {what if not name else 'one of which ' + what}: "
                    "unwrap() the first one (`with HSAID(model, d) as hsaid:` does so at its end), or wrap "
                    "copy.deepcopy(model)"
                )
    for source in sources.values():
        if source.owner is None or source.owner() is not owner:
            source.detach()
