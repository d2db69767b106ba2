"""`EmbeddingRows`: the weight of an embedding, of which only the rows are made that a batch looks up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsaid_kernels.fastfood.rows import place_among
from hsaid_kernels.wrapper.reads.link import Source
from hsaid_kernels.wrapper.weight import READ_ONLY

_SIGNATURES = {function: inspect.signature(function) for function in (F.embedding, F.embedding_bag)}


class EmbeddingRows:
    """What `nn.Embedding.forward` and `nn.EmbeddingBag.forward` get for their weight, and pass on to a lookup.

    Not a tensor: torch calls `__torch_function__` of any object that its functions are given in the place of one. So
    the lookup of some rows in the whole table becomes one in a table of these rows, and all other functions get the
    whole weight.
    """

    def __init__(self, source: Source, name: str, parameter: nn.Parameter):
        self.source, self.name, self.parameter = source, name, parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(_whole(self), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _SIGNATURES:
            bound = _SIGNATURES[function].bind(*args, **(kwargs or {}))
            table, ids = bound.arguments["weight"], bound.arguments["input"]
            if isinstance(table, EmbeddingRows) and table._has_rows_for(ids):
                return table._look_up(function, bound, ids)
        whole = {key: _whole(value) for key, value in (kwargs or {}).items()}
        return function(*map(_whole, args), **whole)

    def _has_rows_for(self, ids: object) -> bool:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
            return False
        return ids.device == self.parameter.device and not torch._C._are_functorch_transforms_active()

    def _look_up(self, function: Callable[..., Any], bound: inspect.BoundArguments, ids: Tensor) -> Any:
        bound.apply_defaults()
        given = bound.arguments
        if given["max_norm"] is not None:
            raise RuntimeError(f"model: {self.name!r} has max_norm, which writes to its weight, but {READ_ONLY}")
        rows, places = torch.unique(ids, return_inverse=True)
        count = self.parameter.shape[0]
        if int(rows[0]) < 0 or int(rows[-1]) >= count:
            raise IndexError("index out of range in self")  # as torch says it
        if given["padding_idx"] is not None:
            given["padding_idx"] = place_among(rows, given["padding_idx"] % count)
        given["input"] = places.to(ids.dtype)
        given["weight"] = self.source.rows(self.name, self.parameter, rows.long())
        given["sparse"] = False  # the gradient is of these rows anyway
        return function(*bound.args, **bound.kwargs)


def _whole(value: Any) -> Any:
    return value.source.read(value.name, value.parameter) if isinstance(value, EmbeddingRows) else value
