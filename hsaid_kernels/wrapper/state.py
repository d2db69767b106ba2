"""`State`: what an HSAID trains and saves: its tasks, `state_dict()` and checkpoints; and what begins a call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hsaid_kernels.wrapper.basis import Basis, Settings, basis_of
from hsaid_kernels.wrapper.checkpoint import files, hub, packing
from hsaid_kernels.wrapper.checkpoint.compare import (
    arguments_of,
    check_config,
    check_state,
    check_value,
    warn_of_other_w0,
)
from hsaid_kernels.wrapper.checkpoint.configuration import (
    DTYPES,
    Config,
    architecture_of,
    describe,
    encode_state,
    w0_checks,
)
from hsaid_kernels.wrapper.checkpoint.ranks import check_active_ranks, check_sharded_ranks
from hsaid_kernels.wrapper.checkpoint.renaming import Names, renamed
from hsaid_kernels.wrapper.isolation import runs_eagerly
from hsaid_kernels.wrapper.levels import fit_levels, rounded_after_steps
from hsaid_kernels.wrapper.tasks import Tasks, groups_of
from hsaid_kernels.wrapper.w0.beside import PREFIX
from hsaid_kernels.wrapper.w0.checks import check_layers, check_parameters, plain
from hsaid_kernels.wrapper.w0.fsdp2 import is_applied
from hsaid_kernels.wrapper.w0.quantized import is_quantized, others_dtype
from hsaid_kernels.wrapper.w0.stored import showing
from hsaid_kernels.wrapper.w0.values import value_of
from hsaid_kernels.wrapper.weights.outside import TRACED
from hsaid_kernels.wrapper.weights.source import WeightSource
from hsaid_kernels.wrapper.weights.traced import prepare_tracing

if TYPE_CHECKING:
    from typing_extensions import Self

TUNING = 2.0  # of the rates of `parameter_groups`, divided by 2**bits, at which values are tuned on their levels


def _read(path: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    if not os.path.isfile(path):
        return files.read(path)
    found = packing.read_packed(path)
    return found.config, found.values


class State(nn.Module):
    """The trained parameters of an HSAID, by task, and how they are saved and loaded.

    Each thread has a current task: the one that it set last, by `set_task` or `use_task`, or, of a thread that has set
    none, the one that any thread set last by `set_task`.
    """

    model: nn.Module
    _basis: Basis
    _tasks: Tasks
    _source: WeightSource
    _described: Config  # after unwrap()

    _own_full = False  # whether the fully trained tensors are the model's own parameters, not copies

    def _begin(self, model: nn.Module, settings: Settings) -> None:
        """Makes the basis, the tasks and the source of the weights. Changes nothing in the model."""
        basis = self._basis = basis_of(model, settings)
        check_layers(model, basis.plan.names, basis.full)
        if not self._own_full:
            check_parameters(model, (*basis.plan.names, *basis.full))
        self._tasks = Tasks(settings.task, basis.full, self._parameters)
        self._source = WeightSource(model, self._tasks, basis, self._own_full)
        self._compare_anew()
        self.training = model.training

    def _claim(self) -> None:
        """From now on, reads of the model's weights give those of this object."""
        self._source.attachment.belongs_to(self)
        self._source.attachment.attach()
        if self._source.attachment.ranks is not None:
            self.w0_checks()

    def _compare_anew(self) -> None:
        """Forgets what has been compared with other ranks, or hashed with them."""
        self._ranks_agree = False  # under DistributedDataParallel
        self._agreed: set[str] = set()  # tasks that all ranks of a sharded model have alike
        self._hashes: str | None = None  # of W0 in shards

    # --- tasks

    @property
    def task(self) -> str:
        """The name of the current task, to which `theta`, `multipliers` and `full` belong."""
        return self._tasks.current

    @property
    def theta(self) -> nn.Parameter:
        """float32 [d - m], initially zeros: the parameter of the current task."""
        return self._tasks.trained()[0]

    @property
    def multipliers(self) -> nn.Parameter:
        """float32 [m], initially ones: the parameter of the current task."""
        return self._tasks.trained()[1]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._tasks.now().items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._check_registered(f"{name}: expected it to be set")
        super().register_parameter(name, param)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they were added."""
        return self._tasks.names

    @property
    def full(self) -> dict[str, nn.Parameter]:
        """{name: parameter} for the tensors that are trained fully in the current task."""
        return self._tasks.full_now()

    def parameter_groups(
        self,
        *,
        lr_theta: float | str | None = "auto",
        lr_multipliers: float | str | None = "auto",
        lr_full: float | str | None = "auto",
        weight_decay: float | None = None,
        task: str | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: "theta", "multipliers" and "full", in this order, empty groups omitted.

        Args:
            lr_theta, lr_multipliers, lr_full: learning rate of each group. "auto" is a rate that learns with AdamW and
                its like: 0.05 for theta and the multipliers (0.01 with normalize="tensor"), 0.005 for `full`; see
                docs/integration.md. None leaves the rate to the optimizer.
            weight_decay: of theta and the fully trained tensors. None leaves it to the optimizer. The multipliers
                always get 0, because weight decay would pull them towards 0 and their neutral value is 1.
            task: the task whose parameters are grouped. None means the current task.

        Raises ValueError for an unknown task and for a rate that is a string but not "auto".
        """
        rates = {"theta": lr_theta, "multipliers": lr_multipliers, "full": lr_full}
        return groups_of(self._tasks.parameters_of(task), rates, weight_decay, self._basis.plan.normalize)

    def add_task(self, name: str) -> None:
        """Adds a task: a separate theta, multipliers and `full` with their initial values, on the same W0 and basis.

        The current task does not change. Use one optimizer per task: it keeps the parameters of the task it was created
        for, also while another task is current.

        Raises TypeError if name is not a non-empty string, ValueError if the task exists, RuntimeError while merged in
        place and after `unwrap()`.
        """
        self._source.attachment.check_on_w0("add_task()")
        self._new_task(name)

    def set_task(self, name: str) -> None:
        """Makes `name` the current task, which `theta`, `multipliers`, `full`, `parameters()` and all calls refer to.

        `state_dict()` too is that of the current task, and the buffers that training changed. Set the task before
        wrapping this module in DistributedDataParallel, which keeps the parameters it finds at construction.

        Other threads that have set a task of their own keep it. So threads can serve different tasks at the same time,
        unless training changed buffers of the model (BatchNorm's statistics), which they share: a call then raises
        RuntimeError.

        Raises ValueError for an unknown task, RuntimeError while merged in place, after `unwrap()`, and inside a call
        of the HSAID, which runs on one theta.
        """
        self._tasks.check(name)
        self._source.attachment.check_on_w0("set_task()")
        self._source.check_outside("set_task()")
        buffers, kept = self._source.attachment.buffers, self._tasks.buffers
        with self._source.attachment.lock:
            changed, others = buffers.changed(self.model), kept.get(name, {})
            if (changed or others) and name != self._tasks.registered and self._source.runs_elsewhere():
                raise RuntimeError(
                    "set_task(): expected no other thread inside a call, because training has changed buffers of the "
                    "model, which threads share, got one: run one task at a time"
                )
            kept[self._tasks.registered] = changed
            self._tasks.switch(name)
            buffers.put(self.model, kept.pop(name, {}))

    @contextlib.contextmanager
    def use_task(self, name: str) -> Iterator[None]:
        """A context manager for the time of which `name` is the current task, in this thread or coroutine only.

        Parameters registered in this module, which DistributedDataParallel and torch.compile see, stay those of
        `set_task`. Raises as `set_task` does.
        """
        self._tasks.check(name)
        self._source.attachment.check_on_w0("use_task()")
        self._source.check_outside("use_task()")
        with self._tasks.using(name):
            yield
            if self.task != name:
                raise RuntimeError(
                    f"use_task(): expected {name!r} to be the current task until the end, got {self.task!r}: leave it "
                    "before set_task() or an earlier use_task() ends, and do not yield inside of it"
                )

    def remove_task(self, name: str) -> None:
        """Deletes a task and its parameters. Raises ValueError for the current task and for an unknown one."""
        self._tasks.remove(name)
        self._agreed.discard(name)

    def _new_task(self, name: str) -> None:
        """Creates the parameters of a new task with their initial values."""
        plan, own = self._basis.plan, self._source.attachment.own()
        device = own[plan.names[0]].device
        theta = torch.zeros(plan.dim, dtype=torch.float32, device=device)
        ones = self._basis.partition.initial().to(device)
        # DID has no multipliers, so this parameter is empty and gets no gradient. requires_grad=False keeps
        # DistributedDataParallel from waiting for one.
        parameters = {"theta": nn.Parameter(theta), "multipliers": nn.Parameter(ones, requires_grad=len(ones) > 0)}
        dtype = others_dtype(own)
        full = {key: value_of(own[key].detach()) for key in self._basis.full}
        full |= {key: value.to(dtype or value.dtype) for key, value in full.items() if is_quantized(own[key])}
        self._tasks.add(name, parameters, full)

    # --- checkpoints

    def save_pretrained(self, directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any) -> None:
        """Saves the current task's parameters and the configuration, a few kilobytes (checkpoint/files.py).

        Writes nothing if `is_main_process` is False, but where FSDP2 has sharded theta all ranks must call it. Other
        arguments of transformers' `save_pretrained` are accepted and ignored.

        Raises OSError if the directory cannot be written to; nothing is half-written then.
        """
        config, values = self._checkpoint()
        # The architecture is not in state_dict(), because training may change a model's configuration.
        config |= {"architecture": architecture_of(self.model)}
        if is_main_process:
            files.write(directory, config, values)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        *,
        backend: str = "auto",
        memory: str = "step",
        names: Names | None = None,
        **of_hub: Any,
    ) -> Self:
        """Wraps `model` as saved in a checkpoint.

        Given the same W0, the projected weights are the same as when saved, bit for bit. Warns if the model's W0
        differs from that of training, for example if a classification head was newly initialized.

        Args:
            directory: what `save_pretrained` or transformers' Trainer wrote; the file of a packed checkpoint (`pack`);
                or the name of a repository of the Hugging Face hub, as in "me/task".
            model: the module to wrap.
            backend, memory: those of `HSAID`.
            names: what the model's tensors were called when it was trained, if the library has renamed them since:
                {new: old}, where `new` may be a regular expression for the whole name and `old` its replacement, or a
                function from new to old; other names are what they were. For a tensor that has been fused since, `old`
                is the list of its pieces, in the order in which they lie in its memory. They keep the basis and the
                multipliers of before, and what is saved from here says their names.
            of_hub: arguments of `huggingface_hub.snapshot_download`: revision, token, cache_dir, ...

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint has an unknown format or generator version, or is truncated or corrupted; or the
                names, shapes or order of the model's tensors differ from the saved ones (the message lists the first,
                and proposes `names` where a renaming is likely), or do not fit `names`.
            OSError: the checkpoint cannot be read.
        """
        config, values = _read(hub.local_directory(directory, **of_hub))
        model = plain(model)
        with showing(model):
            if names is not None:
                config, values = renamed(config, values, model, names)
            arguments = arguments_of(config, model)
        hsaid = cls(model, **arguments, backend=backend, memory=memory)
        hsaid._fill(values)
        warn_of_other_w0(config, hsaid.w0_checks())
        return hsaid

    def load_task(self, directory: str | os.PathLike[str], **of_hub: Any) -> str:
        """Adds the task stored in a checkpoint, makes it the current task and returns its name.

        `directory` and `of_hub` are as in `from_pretrained`. The checkpoint must come from the same basis, tensors and
        W0. A different W0 only causes a warning. Raises what `from_pretrained` raises, and ValueError for a different
        basis or a task whose name already exists.
        """
        config, values = _read(hub.local_directory(directory, **of_hub))
        check_config("directory", config, self.configuration())
        before, task = self.task, config["task"]
        self.add_task(task)
        self.set_task(task)
        try:
            self._fill(values)
        except ValueError:
            self.set_task(before)
            self.remove_task(task)
            raise
        return str(task)

    def push_to_hub(self, repo_id: str, **of_hub: Any) -> str:
        """Uploads the checkpoint of the current task and a model card to the Hugging Face hub; see `hub.push`."""
        return hub.push(self.save_pretrained, self.model, repo_id, **of_hub)

    def pack(
        self,
        bits: int = packing.BITS,
        data: Iterable[Mapping[str, Any]] | None = None,
        *,
        multiplier_bits: int = packing.MULTIPLIER_BITS,
    ) -> bytes:
        """The checkpoint of the current task in few bits, some hundred bytes for d = 1,000; see `packing.pack`.

        Write them to a file, and load it by `from_pretrained(file, model)` or `load_task(file)`.

        Args:
            bits: theta is rounded to 2**bits levels, from 1 to 16.
            data: batches to tune on, {name: argument of the model}, a step for each, with the values kept on their
                levels (`rounded`). The rates are those of `parameter_groups`, falling to 0. The values stay there.
                None rounds a copy.
            multiplier_bits: of the multipliers. Fully trained tensors have 8 bits, and buffers that training changed
                are there as they are.

        Raises TypeError or ValueError for other widths and for values that are not finite, ImportError without the
        package constriction.
        """
        if data is not None:
            batches = list(data)
            optimizer = torch.optim.AdamW(self.parameter_groups(weight_decay=0.0))
            schedule = torch.optim.lr_scheduler.LinearLR(
                optimizer, min(1.0, TUNING / 2**bits), 0.0, max(1, len(batches))
            )
            with self.rounded(optimizer, bits, multiplier_bits=multiplier_bits):
                for batch in batches:
                    self(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
        return packing.pack(*self._checkpoint(), bits, multiplier_bits)

    def rounded(
        self,
        optimizer: torch.optim.Optimizer,
        bits: int = packing.BITS,
        *,
        multiplier_bits: int = packing.MULTIPLIER_BITS,
    ) -> contextlib.AbstractContextManager[None]:
        """A context manager in which theta and the multipliers stay on the levels that `pack` gives them.

        `optimizer`, of any training loop, trains the values behind the levels, with gradients at the levels ("straight
        through"): a few steps of it undo most of what rounding costs. The levels are chosen at the beginning. At the
        end the parameters hold levels, which `pack` with the same widths keeps. Raises as `pack`.
        """
        widths = {self.theta: (bits, 0.0), self.multipliers: (multiplier_bits, 1.0)}
        return rounded_after_steps(optimizer, {p: fit_levels(p, *width) for p, width in widths.items()})

    def _checkpoint(self) -> tuple[Config, dict[str, Tensor]]:
        """The configuration and the values of the current task."""
        values = {name: value_of(parameter.detach()) for name, parameter in self.named_parameters()}
        buffers = {f"{PREFIX}{name}": buffer for name, buffer in self.buffers_changed().items()}
        config = self.configuration()
        if config["dtype"] not in DTYPES:  # hsaid.double(), of which no checkpoint can be read
            raise TypeError(
                f"model: expected weights in {', '.join(DTYPES)}, got {config['dtype']}: call float() before unwrap()"
            )
        return config, values | buffers

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        """Copies a checkpoint's values into the parameters of the current task, and into the model's buffers.

        First checks that each parameter has a value of its shape and dtype, and each other value is of a buffer;
        otherwise raises ValueError and changes nothing.
        """
        parameters, attachment = dict(self.named_parameters()), self._source.attachment
        for name, parameter in parameters.items():
            check_value(values, name, parameter.shape, parameter.dtype)
        buffers = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
        attachment.buffers.check("buffers", self.model, buffers)
        attachment.buffers.put(self.model, buffers)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])

    def configuration(self) -> Config:
        """What a checkpoint says beside its values, see `configuration.describe`; after `unwrap()`, as before."""
        if not self._source.attachment.attached:
            return self._described | {"task": self.task}
        return self._description(self.full)

    def _description(self, full: Mapping[str, Tensor]) -> Config:
        attachment = self._source.attachment
        own = {**attachment.parameters, **attachment.known_w0(), **attachment.buffers.tracked(self.model)}
        return describe(self._basis, self.task, self.dtype, full, self.w0_checks(), own)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the projected weights; of the first one, if W0 has several."""
        return self._basis.settings.dtype or next(iter(self._source.attachment.known_w0().values())).dtype

    def w0_checks(self) -> str:
        """Hashes of some values of each W0_i, as they are in checkpoints; see `configuration.w0_checks`."""
        w0 = self._source.attachment.known_w0()
        if self._source.attachment.ranks is None:
            return w0_checks(w0)
        # All ranks compute these together, when they have wrapped the model or at the first step, and one may save.
        self._hashes = self._hashes or w0_checks(w0)
        return self._hashes

    def buffers_changed(self) -> dict[str, Tensor]:
        """{name: copy} of the model's buffers that have changed since it was wrapped (BatchNorm's statistics).

        After `unwrap()`, those that had changed before.
        """
        if self._source.attachment.attached and self._tasks.current == self._tasks.registered:
            return self._source.attachment.buffers.changed(self.model)
        return self._tasks.buffers.get(self._tasks.current, {})

    # --- state_dict()

    def get_extra_state(self) -> Tensor:
        return encode_state(self.configuration())

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: `_load_from_state_dict` has already checked the configuration."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self._tasks.current != self._tasks.registered:
            self._check_buffers()
        own = self.named_parameters()  # of this thread's task
        destination.update({f"{prefix}{name}": p if keep_vars else p.detach() for name, p in own})
        destination[f"{prefix}_extra_state"] = self.get_extra_state()
        # All, and not copies, as of any module: averages of models pair values by their order, and write to them.
        attachment = self._source.attachment
        buffers = attachment.buffers.tracked(self.model) if attachment.attached else self.buffers_changed()
        destination.update({f"{prefix}{PREFIX}{name}": buffer.detach() for name, buffer in buffers.items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Checked before anything is loaded, so that a state_dict with another configuration changes nothing here.
        of_model, attachment = f"{prefix}{PREFIX}", self._source.attachment
        buffers = {key[len(of_model) :]: value for key, value in state_dict.items() if key.startswith(of_model)}
        try:
            attachment.check_on_w0("load_state_dict()")
            self._check_registered("state_dict: expected it to be loaded")
            attachment.buffers.check("state_dict", self.model, buffers)
            if (key := f"{prefix}_extra_state") in state_dict:
                check_state(state_dict[key], self.configuration())
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
        else:
            own = {key: value for key, value in state_dict.items() if not key.startswith(of_model)}
            super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)
            self._agreed.clear()
            attachment.buffers.put(self.model, buffers)

    # --- calls of the model

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self._source.drop_cache()
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compare_anew()
        self._source.attachment.belongs_to(self)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "HSAID does not run in torch.nn.DataParallel, because W0 stays on one device: use DistributedDataParallel "
            "(torchrun, accelerate launch), or let this process see one device only (CUDA_VISIBLE_DEVICES=0)"
        )

    def _checked(self) -> None:
        if self._tasks.current != self._tasks.registered:
            self._check_buffers()
        if dist.is_available() and dist.is_initialized():
            self._check_ranks()

    @runs_eagerly
    def _computing(self) -> contextlib.AbstractContextManager[None]:
        self._checked()
        once = self._source.around.reduced_once
        if torch.is_grad_enabled() and (once.applies or (dist.is_available() and dist.is_initialized())):
            once.expect(self, self._tasks.trained())
        return self._source.call(self.training)

    def _traced(self) -> bool:
        """What `_computing` checks, for torch.compile, which calls this once, while tracing."""
        if torch.compiler.is_exporting():  # asked here, because torch.compile of torch 2.11 answers with True
            raise RuntimeError(TRACED)
        self._checked()
        prepare_tracing(self._source.maker)
        return True

    # Sets what torch.compiler.assume_constant_result sets. The decorator itself would import all of torch._dynamo here.
    _traced.__dict__["_dynamo_marked_constant"] = True

    # --- what could be another's

    def _check_registered(self, what: str) -> None:
        """Raises RuntimeError, which begins with `what`, if this thread's task is not the registered one."""
        if "_tasks" in self.__dict__ and self._tasks.current != self._tasks.registered:
            raise RuntimeError(
                f"{what} while the task of this thread, {self._tasks.current!r}, is the one that was set last, got "
                f"{self._tasks.registered!r}: call set_task() in place of use_task(), in one thread at a time"
            )

    def _check_buffers(self) -> None:
        """Raises RuntimeError if the model's buffers are those of the registered task, and not of this thread's."""
        tasks = self._tasks
        if tasks.buffers.get(tasks.current) or self._source.attachment.buffers.changed(self.model):
            raise RuntimeError(
                f"task: expected {tasks.current!r} to be set for all threads, because training has changed buffers of "
                f"the model, which threads share, got {tasks.registered!r}: call set_task({tasks.current!r}), and run "
                "one task at a time"
            )

    def _check_ranks(self) -> None:
        """At the first training step of several ranks, or call of a sharded model, checks their basis and W0.

        DistributedDataParallel and FSDP2 themselves broadcast neither. Raises ValueError if they differ.
        """
        if self._ranks_agree:
            return
        attachment = self._source.attachment
        if attachment.ranks is None and is_applied(self, self.model):
            attachment.own()  # sees that it has been sharded since
        if (ranks := attachment.ranks) is not None:
            if self.task not in self._agreed:
                check_sharded_ranks(self.configuration(), self.named_parameters(), ranks, attachment.own())
                self._agreed.add(self.task)
        elif torch.is_grad_enabled():  # under DistributedDataParallel evaluation may run on a single rank
            self._ranks_agree = check_active_ranks(self.configuration, {self, self.model})
