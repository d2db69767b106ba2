"""The rows of embeddings at `padding_idx`, which ordinary fine-tuning does not train and HSAID leaves at W0."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from hsaid_kernels.wrapper.weight import LOOKUPS

KEYS = ("weight", "weight_orig")  # the latter of a table that torch.nn.utils.prune masks


def find_padding_rows(model: nn.Module, names: Collection[str]) -> dict[str, int]:
    """{name: row} of those of these tensors that only embeddings hold, all with the same `padding_idx`.

    Another layer that holds the table, such as a language model's tied head, or an embedding with another
    `padding_idx`, trains the row.
    """
    rows: dict[int, set[int | None]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                rows.setdefault(id(parameter), set()).add(_row(module, key, parameter))
    found = {name: rows[id(parameter)] for name, parameter in model.named_parameters() if name in names}
    return {name: row for name, (row, *others) in found.items() if row is not None and not others}


def _row(module: nn.Module, key: str, parameter: nn.Parameter) -> int | None:
    """The row of this parameter that the module does not train."""
    row: int | None = getattr(module, "padding_idx", None)
    if key not in KEYS or not isinstance(module, tuple(LOOKUPS)) or row is None:
        return None
    count = parameter.shape[0]
    return row % count if -count <= row < count else None  # torch counts negative ones from the end
