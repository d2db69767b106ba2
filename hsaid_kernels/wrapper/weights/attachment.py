"""`Attachment`: attaches a wrapper to a model, verifies that the model is still the same, and gives it back.

It swaps the classes of the model's modules (reads/properties.py), freezes W0, and remembers what both were.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hsaid_kernels.fastfood.plan import Plan
from hsaid_kernels.wrapper.reads.compiled_layers import compiled_as_before, keep_compiled_current
from hsaid_kernels.wrapper.reads.link import Link, Source, link_of
from hsaid_kernels.wrapper.reads.properties import attach, detach
from hsaid_kernels.wrapper.reads.registration import watch_registrations
from hsaid_kernels.wrapper.tasks import Tasks
from hsaid_kernels.wrapper.w0.beside import Buffers, forget_derived, masks
from hsaid_kernels.wrapper.w0.checks import (
    check_hooks,
    check_memory,
    check_replaced,
    check_sharding,
    check_tensors_stay,
)
from hsaid_kernels.wrapper.w0.fsdp2 import Ranks
from hsaid_kernels.wrapper.w0.snapshot import Snapshot
from hsaid_kernels.wrapper.w0.stored import Stored, needs_all, parameters_of, show, shown_in
from hsaid_kernels.wrapper.w0.values import can_compare, stands_for
from hsaid_kernels.wrapper.weight import Weight, is_given


class Attachment:
    """A model and what it was before it was wrapped.

    Args:
        model: the model whose parameters are W0.
        plan: its projected tensors.
        tasks: has the thetas, to know whether any of them moves the weights.
        full: names of the fully trained tensors.
        own_full: whether these are the model's own parameters, and not copies.
        memory: see `HSAID`.

    Attributes:
        attached: whether the model is wrapped.
        parameters: the model's own parameters by name, as they were when it was last verified.
        flags: {name: requires_grad before the model was wrapped}. W0 does not require gradients while it is wrapped, so
            that neither an optimizer nor DistributedDataParallel around a larger module take it for trained.
        others: names of parameters that are in the model since, and belong there.
        merged: {name: W0_i} while the model holds the projected weights (`merge`), else None.
        merged_task: whose weights these are.
        buffers: the model's buffers as they were before it was wrapped.
        ranks: those that have shards of the model, where FSDP2 has sharded it, else None.
        lock: held while weights are made, by one thread at a time.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, tasks: Tasks, full: Collection[str], *, own_full: bool, memory: str
    ):
        snapshot = Snapshot(model)
        self._model = weakref.ref(model)
        self.plan, self.tasks, self.own_full, self.memory = plan, tasks, own_full, memory
        self._full = frozenset(full)
        self._answered = plan.shapes.keys() | (frozenset() if own_full else self._full)
        self.aliases, self.parameters = snapshot.aliases, snapshot.parameters
        self.flags = {name: parameter.requires_grad for name, parameter in snapshot.parameters.items()}
        self.others: set[str] = set()
        self.attached = False
        self.ranks: Ranks | None = None
        self.merged: dict[str, Tensor] | None = None
        self.merged_task = ""
        self.buffers = Buffers(model)
        self._start()

    def _start(self) -> None:
        """Makes what is not copied with this object."""
        watch_registrations()
        self._owner: weakref.ref[nn.Module] | None = None
        self._source: weakref.ref[Any] | None = None
        self.lock = threading.RLock()
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # that are tied to the model, or in it since
        self._accepted = WeakTensorKeyDictionary()  # that were set when this changed nothing

    def __getstate__(self) -> dict[str, Any]:
        made_again = ("_owner", "_source", "lock", "_modules", "_adopted", "_accepted")
        state = {key: value for key, value in self.__dict__.items() if key not in made_again}
        return state | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        self.__dict__.update(state | {"_model": weakref.ref(nn.Module() if model is None else model)})
        self._start()

    @property
    def model(self) -> nn.Module:
        """The wrapped model. Not kept alive from here: its modules refer to this object, and would make a circle."""
        model = self._model()
        if model is None:
            raise RuntimeError("model: expected the one that was wrapped to be in use, but it is gone")
        return model

    def model_in_use(self) -> nn.Module | None:
        """The wrapped model; None if somebody has kept a part of it, and not the model."""
        return self._model()

    @property
    def owner(self) -> nn.Module | None:
        """The HSAID. Not kept alive from here: the model refers to this, and `del hsaid` frees it for another one."""
        return None if self._owner is None else self._owner()

    def belongs_to(self, owner: nn.Module) -> None:
        """Notes whose model this is. Raises ValueError if it is another HSAID's, as after copy.copy()."""
        if self.owner is not None and self.owner is not owner:
            raise ValueError(
                "model: expected one that no HSAID wraps, got that of the HSAID which was copied: deepcopy it"
            )
        self._owner = weakref.ref(owner)

    # --- attaching

    def answer_by(self, source: Source) -> None:
        """Notes what will answer the reads. It holds this object, and is not held from here."""
        self._source = weakref.ref(source)

    def attach(self) -> None:
        """From now on, reads of the model's weights are answered."""
        self.attached = True
        try:
            self._scan()
        except Exception:  # such as a module whose class cannot be replaced
            self.detach()
            raise
        forget_derived(self.model)

    def detach(self, buffers: bool = True) -> None:
        """Gives back the plain model: its classes, W0, and whether its parameters require gradients.

        `buffers`: whether its buffers become what they were, too.
        """
        if self.merged is not None:
            self.unmerge()
        self.attached = False
        if self.ranks is not None:
            self.ranks.release()
            self.ranks = None
        self.put_back()
        snapshot = Snapshot(self.model)
        for module in {self.model, *snapshot.modules, *self._modules, *self._adopted}:
            _release(module)
        self._modules.clear()
        self._adopted.clear()
        self._give_flags_back(self.parameters)
        self._give_flags_back(snapshot.parameters)
        if buffers:
            self.buffers.put(self.model, {})
        forget_derived(self.model)

    def _give_flags_back(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if self.flags.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad_(self.flags[name])

    def _attach(self, module: nn.Module, names: Mapping[str, str | None], masks: Mapping[str, Any]) -> None:
        source: Source | None = None if self._source is None else self._source()
        assert source is not None
        attach(module, source, self, names, masks)

    # --- changes of the model that are heard of

    def note_change(self) -> None:
        if (model := self._model()) is not None and (link := link_of(model)) is not None:
            link.snapshot = None

    def owns(self, parameter: object) -> bool:
        own = parameter.w0 if isinstance(parameter, Weight) else parameter
        return any(own is known for known in self.parameters.values())

    def adopt(self, module: nn.Module, keys: Iterable[str]) -> None:
        self._adopted.add(module)
        link = link_of(module)
        known: Mapping[str, str | None] = {} if link is None else link.names
        self._attach(module, {**known, **dict.fromkeys(keys)}, {})

    def put_back(self, changed: nn.Module | None = None) -> None:
        model = self._model()
        if model is None or (link := link_of(model)) is None or link.snapshot is None:
            return
        link.snapshot.put_back(changed)
        for module in (model, *link.snapshot.modules):
            if (own := link_of(module)) is not None:
                module.__dict__.update({key: own.before[key] for key in own.before.keys() - module.__dict__.keys()})

    def check_set(self, call: str, own: nn.Parameter, value: Tensor, converted: bool = False) -> None:
        value = value.w0 if isinstance(value, Weight) else value
        name = next((name for name, known in self.parameters.items() if known is own), None)
        if value is own or name is None or self.own_full or self.merged is not None:
            return
        if self.others and call == "load_state_dict()":  # of a model with theta in it, which has W0 beside theta
            return
        if self.owns(value):
            raise ValueError(
                f"{call}: expected {name!r} to stay while an HSAID wraps the model, got another parameter of it, to "
                "which it would be tied: unwrap() it first"
            )
        moved = self.tasks.have_moved if name in self.plan.shapes else None
        check_replaced(call, name, own, value, name in self._full, moved, converted, self.memory)
        self._accepted[value] = True

    # --- looking at the model

    def verified(self) -> dict[str, nn.Parameter]:
        """The model's parameters. Raises if the model has changed in a way that would not be heard."""
        model = self._model()
        if model is None:  # somebody has kept a part of it
            return self.parameters
        link: Link | None = model.__dict__.get("_hsaid")
        snapshot = link.snapshot if link is not None and link.changes is self else None
        if snapshot is None or not snapshot.holds():
            snapshot = self._scan()
        compiled = [module for module in (model, *snapshot.modules) if module.__dict__.get("_compiled_call_impl")]
        if compiled:
            keep_compiled_current(compiled)
        if self.ranks is not None:
            self.ranks.check_unchanged({name: snapshot.now(name) for name in self.plan.names})
        for name, parameter in snapshot.parameters.items():
            left_out = name in self.flags and name not in self.plan.shapes and name not in self._full
            if parameter.requires_grad and left_out:
                raise RuntimeError(
                    f"model: expected {name!r} to stay frozen, because the HSAID leaves it out, got "
                    "requires_grad=True: unwrap() the model, and wrap it again"
                )
            if parameter._backward_hooks and name in self.flags and not self.own_full:
                check_hooks({name: parameter})
        return snapshot.parameters

    def snapshot(self) -> Snapshot:
        """The modules and parameters of the model, as they were when it was last verified."""
        link = link_of(self.model)
        if link is None or link.snapshot is None:
            self.verified()
            link = link_of(self.model)
        assert link is not None and link.snapshot is not None
        return link.snapshot

    def parameter_now(self, name: str) -> nn.Parameter:
        """The parameter that is in the model now: a shard, or what FSDP2 has gathered from it."""
        return self.snapshot().now(name)

    def own(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name, where a tied parameter appears once."""
        with self.lock:
            return self.verified() if self.attached else parameters_of(self.model) | self._of_layers()

    def _of_layers(self) -> dict[str, nn.Parameter]:
        """The weights of quantized layers, which these show no longer after `detach`."""
        return {name: parameter for name, parameter in self.parameters.items() if isinstance(parameter, Stored)}

    def known_w0(self) -> dict[str, Tensor]:
        """{name: W0_i}; of a model that has been changed so that it cannot be called, those of before that."""
        try:
            return self.w0()
        except (RuntimeError, ValueError, TypeError):
            return {name: self.parameters[name] for name in self.plan.names}

    def w0(self) -> dict[str, Tensor]:
        """{name: W0_i} for the projected tensors."""
        own: Mapping[str, Tensor] = self.own() if self.merged is None else self.merged
        return {name: own[name] for name in self.plan.names}

    def _scan(self) -> Snapshot:
        """Looks at the model again. Raises ValueError if it has other tensors than when it was wrapped."""
        model = self.model
        show(model, self.parameters.values())
        for module in model.modules():
            if (link := link_of(module)) is None or link.changes is not self:
                self._attach(module, {}, {})
        snapshot = Snapshot(model)
        names, now = snapshot.names(), snapshot.parameters
        now |= {name: self.parameters[name] for name, p in now.items() if is_given(p) and name in self.parameters}
        self._check_same(snapshot)
        if self.ranks is None:
            self.ranks = Ranks.of(now.values())
        masked: dict[nn.Module, dict[str, Any]] = defaultdict(dict)
        for module, hook in masks([model, *snapshot.modules]):
            masked[module][hook._tensor_name] = hook
        for module in (model, *snapshot.modules):
            own = {key: names[id(p)] for key, p in shown_in(module).items() if p is not None}
            answered = {key: name for key, name in own.items() if name in self._answered}
            self._attach(module, own if needs_all(module, answered) else answered, masked[module])
        for name, parameter in now.items():
            if parameter.requires_grad and name in self.flags and not (self.own_full and name in self._full):
                parameter.requires_grad_(False)
        for module in set(self._modules) - {model, *snapshot.modules}:  # which have left the model
            _release(module)
        self._modules = weakref.WeakSet((model, *snapshot.modules))
        here = {id(parameter) for parameter in now.values()}
        left = {name: parameter for name, parameter in self.parameters.items() if id(parameter) not in here}
        self._give_flags_back({name: p for name, p in left.items() if not stands_for(now.get(name), p)})
        link = link_of(model)
        assert link is not None
        link.snapshot, self.parameters = snapshot, now
        return snapshot

    def _check_same(self, snapshot: Snapshot) -> None:
        """Raises if the model does not have the tensors that it had when it was wrapped, or others in their place."""
        now = snapshot.parameters
        for name in (name for name in self.plan.names if name in now):
            before = self.parameters[name]
            same = now[name] is before or now[name] in self._accepted or now[name].shape != before.shape
            if not same and can_compare(now[name]):
                self.check_set("model", before, now[name], converted=True)
        if untied := sorted(self.aliases.keys() & now.keys()):
            raise ValueError(
                f"model: expected {untied[0]!r} to be tied as it was when it was wrapped, got one of its own"
            )
        check_sharding(now)
        projected = {name: now.get(name, self.parameters[name]) for name in self.plan.names}
        check_memory(self.memory, projected, now.values())
        check_tensors_stay(self.plan.shapes, self.flags, self.others, now)

    # --- merging in place

    def merge(self, values: Mapping[str, Tensor]) -> None:
        """Puts `values` into the model's own parameters of these names, until `unmerge`."""
        own = self.own()
        self.merged, self.merged_task = {name: own[name].data for name in values}, self.tasks.current
        # Fully trained tensors are cloned, so that writes to the merged model do not change them.
        for name, value in values.items():
            own[name].data = value.data if name in self.plan.shapes else value.data.clone()
        forget_derived(self.model)

    def unmerge(self) -> None:
        """Restores the data that `merge` replaced. Raises RuntimeError if nothing is merged."""
        if self.merged is None:
            raise RuntimeError("unmerge(): expected weights that merge(inplace=True) has merged, found none")
        own = parameters_of(self.model)
        for name, value in self.merged.items():
            own[name].data = value
        self.merged = None
        forget_derived(self.model)

    def keep_merged(self) -> None:
        """What `merge` has put into the model becomes W0. Frees the W0 of before."""
        own = dict(self.model.named_parameters())
        for name in self.merged or ():
            own[name].data = own[name].data.clone()  # out of the one buffer that all weights share
        self.merged = None

    def check_on_w0(self, call: str) -> None:
        """Raises RuntimeError, which names `call`, after `unwrap` and while the model holds the projected weights."""
        if not self.attached:
            raise RuntimeError(
                f"{call}: expected an HSAID that wraps a model, got one after unwrap(): wrap the model again"
            )
        if self.merged is not None:
            raise RuntimeError(
                f"{call}: expected a model on its W0, got one that merge(inplace=True) has merged: unmerge()"
            )

    def check_merged_task(self) -> None:
        """Raises RuntimeError if the model holds the weights of another task than this thread's."""
        if self.merged is not None and self.tasks.current != self.merged_task:
            raise RuntimeError(
                f"task: expected {self.merged_task!r}, whose weights merge(inplace=True) has put into the model, got "
                f"{self.tasks.current!r}: unmerge() first"
            )


def _release(module: nn.Module) -> None:
    compiled_as_before(module)
    detach(module)


def unwrapped_before(model: nn.Module, owner: nn.Module) -> None:
    """Frees a model for a new HSAID, `owner`. Raises ValueError if another HSAID wraps it, or a part of it."""
    found = {}
    for name, module in model.named_modules():
        link = link_of(module)
        if link is not None and isinstance(link.changes, Attachment):
            found[id(link.changes)] = link.changes
            if link.changes.owner is not None and link.changes.owner is not owner:
                what = f"its {name!r} already is" if name else f"a {type(module).__name__} that already is"
                raise ValueError(
                    f"model: expected one that no HSAID wraps, got {what if not name else 'one of which ' + what}: "
                    "unwrap() the first one (`with HSAID(model, d) as hsaid:` does so at its end), or wrap "
                    "copy.deepcopy(model)"
                )
    for attachment in found.values():
        if attachment.owner is not owner:
            attachment.detach()
