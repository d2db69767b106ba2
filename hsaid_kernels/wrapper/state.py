"""`Saved`: what an HSAID saves and loads, in checkpoints and as `state_dict()`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hsaid_kernels.wrapper.checkpoint import files as checkpoint
from hsaid_kernels.wrapper.checkpoint import hub
from hsaid_kernels.wrapper.checkpoint.compare import check_state
from hsaid_kernels.wrapper.checkpoint.configuration import Config, describe, encode_state
from hsaid_kernels.wrapper.stand_in import StandIn
from hsaid_kernels.wrapper.tasks import Tasks
from hsaid_kernels.wrapper.w0.beside import PREFIX
from hsaid_kernels.wrapper.weights.source import ProjectedWeights

if TYPE_CHECKING:
    from typing_extensions import Self


class Saved(StandIn):
    """Checkpoints and `state_dict()` of a class with the attributes of `HSAID`."""

    _projected: ProjectedWeights
    _tasks: Tasks
    _agreed: set[str]
    _described: Config  # after unwrap()
    _buffers_of: dict[str, dict[str, Tensor]]  # the buffers that training changed, of tasks that are not in the model

    def _check_registered(self, what: str) -> None:
        """Raises RuntimeError, which begins with `what`, if this thread's task is not the registered one."""
        if "_tasks" in self.__dict__ and self._tasks.current != self._tasks.registered:
            raise RuntimeError(
                f"{what} while the task of this thread, {self._tasks.current!r}, is the one that was set last, got "
                f"{self._tasks.registered!r}: call set_task() in place of use_task(), in one thread at a time"
            )

    def _check_buffers(self) -> None:
        """Raises RuntimeError if the model's buffers are those of another thread's task."""
        tasks, buffers = self._tasks, self._projected.buffers
        if tasks.current == tasks.registered:
            return
        if self._buffers_of.get(tasks.current) or buffers.changed(self.model):
            raise RuntimeError(
                f"task: expected {tasks.current!r} to be set for all threads, because training has changed buffers of "
                f"the model, which threads share, got {tasks.registered!r}: call set_task({tasks.current!r}), and run "
                "one task at a time"
            )

    def save_pretrained(self, directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any) -> None:
        """Saves the current task's parameters and the configuration, a few kilobytes; see `checkpoint.save_pretrained`.

        Writes nothing if `is_main_process` is False, but where FSDP2 has sharded theta all ranks must call it. Other
        arguments of transformers' `save_pretrained` are accepted and ignored.
        """
        checkpoint.save_pretrained(self, directory, write=is_main_process)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        *,
        backend: str = "auto",
        memory: str = "step",
        **of_hub: Any,
    ) -> Self:
        """Wraps `model` as saved in a checkpoint; its W0 must be that of training. See `checkpoint.from_pretrained`.

        `directory` may be the name of a repository of the Hugging Face hub, as in "me/task". `of_hub` are arguments of
        `huggingface_hub.snapshot_download`: revision, token, cache_dir, ...
        """
        local = hub.local_directory(directory, **of_hub)
        return checkpoint.from_pretrained(cls, local, model, backend=backend, memory=memory)

    def load_task(self, directory: str | os.PathLike[str], **of_hub: Any) -> str:
        """Adds the task stored in a checkpoint, makes it the current task and returns its name.

        `directory` and `of_hub` are as in `from_pretrained`. The checkpoint must come from the same basis, tensors and
        W0. A different W0 only causes a warning. Raises what `from_pretrained` raises, and ValueError for a different
        basis or a task whose name already exists.
        """
        return checkpoint.load_task(self, hub.local_directory(directory, **of_hub))

    def push_to_hub(self, repo_id: str, **of_hub: Any) -> str:
        """Uploads the checkpoint of the current task and a model card to the Hugging Face hub; see `hub.push`."""
        return hub.push(self, repo_id, **of_hub)

    def buffers_changed(self) -> dict[str, Tensor]:
        """{name: copy} of the model's buffers that have changed since it was wrapped (BatchNorm's statistics).

        After `unwrap()`, those that had changed before.
        """
        if self._projected.attached and self._tasks.current == self._tasks.registered:
            return self._projected.buffers.changed(self.model)
        return self._buffers_of.get(self._tasks.current, {})

    def configuration(self) -> Config:
        """What a checkpoint says beside its values, see `configuration.describe`; after `unwrap()`, as before."""
        return describe(self) if self._projected.attached else self._described | {"task": self.task}

    def put_buffers(self, values: Mapping[str, Tensor]) -> None:
        """Gives the model's buffers the values that they had when it was wrapped, or those of `values`.

        Raises ValueError, and changes nothing, if the model has no such buffers.
        """
        self._projected.buffers.check("buffers", self.model, values)
        self._projected.buffers.put(self.model, values)

    def get_extra_state(self) -> Tensor:
        return encode_state(self.configuration())

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: `_load_from_state_dict` has already checked the configuration."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self._check_buffers()
        own = self.named_parameters()  # of this thread's task
        destination.update({f"{prefix}{name}": p if keep_vars else p.detach() for name, p in own})
        destination[f"{prefix}_extra_state"] = self.get_extra_state()
        # All, and not copies, as of any module: averages of models pair values by their order, and write to them.
        attached = self._projected.attached
        buffers = self._projected.buffers.tracked(self.model) if attached else self.buffers_changed()
        destination.update({f"{prefix}{PREFIX}{name}": buffer.detach() for name, buffer in buffers.items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        # Checked before anything is loaded, so that a state_dict with another configuration changes nothing here.
        of_model = f"{prefix}{PREFIX}"
        buffers = {key[len(of_model) :]: value for key, value in state_dict.items() if key.startswith(of_model)}
        try:
            self._projected.check_on_w0("load_state_dict()")
            self._check_registered("state_dict: expected it to be loaded")
            self._projected.buffers.check("state_dict", self.model, buffers)
            if (key := f"{prefix}_extra_state") in state_dict:
                check_state(state_dict[key], self)
        except (RuntimeError, ValueError) as error:
            errors.append(str(error))
        else:
            own = {key: value for key, value in state_dict.items() if not key.startswith(of_model)}
            super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)
            self._agreed.clear()
            self._projected.buffers.put(self.model, buffers)
