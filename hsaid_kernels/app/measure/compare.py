"""Other methods on a sequence classifier of transformers, beside our subspaces: what they train, and how many values.

Every method trains the classification head as it is, because it is new, and its own values for the pretrained part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hsaid_kernels.files import replace_files

if TYPE_CHECKING:
    from peft import PeftConfig

VALUES = 5_000  # trained in all, the head included, where a method lets one choose
VERA_RANK = 32  # VeRA trains rank + outputs values for each matrix, so the rank hardly matters for their number
TRAINED_FILE = "trained.safetensors"  # of methods that PEFT does not have

METHODS = ("lora", "vera", "unilora", "fourierft", "bitfit", "gpart")


def check_method(method: str) -> tuple[str, int | None]:
    """Splits a method such as "lora:8" into its name and size; without a size, that is None.

    Raises ValueError for an unknown method or a size that it cannot have.
    """
    name, colon, text = method.partition(":")
    if name not in METHODS:
        raise ValueError(f"compare: expected some of {', '.join(METHODS)}, got {method!r}")
    if colon and (name == "bitfit" or not text.isdecimal() or int(text) < 1):
        expected = "no size, because BitFit trains all biases" if name == "bitfit" else "a size above 0, as in lora:8"
        raise ValueError(f"compare: expected {expected}, got {method!r}")
    return name, int(text) if colon else None


def check_methods(methods: Iterable[str]) -> None:
    """Raises as `check_method`, and ImportError if PEFT is needed and missing."""
    names = [check_method(method)[0] for method in methods]
    if set(names) - {"bitfit", "gpart"}:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            needed = ", ".join(names)
            raise ImportError(f"compare: {needed} need the package peft (pip install peft): {error}") from error


def adapted(model: nn.Module, method: str, seed: int) -> nn.Module:
    """A classifier of transformers that trains only the parameters of `method`, and its head; they require gradients.

    `model` is changed in place and must be used no more, except through the result. A size in `method` is LoRA's and
    VeRA's rank, the length of Uni-LoRA's and GPart's theta or the number of FourierFT's frequencies for each matrix.
    Without it, they are a rank of 1, of `VERA_RANK`, and as many as make about `VALUES` trained values in all. `seed`
    determines all random numbers.

    Raises as `check_method`, and ValueError for a model without a head or, for BitFit, without biases.
    """
    method, size = check_method(method)
    head = _head(model)
    if not head:
        raise ValueError(f"model: expected a sequence classifier of transformers, got {type(model).__name__}")
    if method == "bitfit":
        return _bitfit(model, head)
    if method == "gpart":
        return _gpart(model, head, size, seed)
    import peft

    targets = _targets(model, getattr(peft.utils, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING"))
    if not targets:
        raise ValueError(f"model: expected one with linear layers, got {type(model).__name__}")
    spare = VALUES - sum(weight.numel() for weight in head.values())
    config: Any = _CONFIGS[method](size, spare if spare > 0 else VALUES, list(targets.values()), seed)
    config.task_type = peft.TaskType.SEQ_CLS
    config.target_modules = set(targets)
    config.modules_to_save = _modules(model, head)  # the head: trained and saved as it is
    config.fan_in_fan_out = not isinstance(next(iter(targets.values())), nn.Linear)  # GPT-2's Conv1D
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A model with both kinds of layers gets the right setting for each, with a warning.
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def save_adapted(model: nn.Module, directory: Path) -> None:
    """Writes what the result of `adapted` trains, and PEFT's configuration, into a directory. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        # Otherwise PEFT asks the hub whether the embeddings were enlarged.
        model.save_pretrained(directory, save_embedding_layers=False)  # type: ignore[operator]
        return
    values = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    replace_files({directory / TRAINED_FILE: save(values)})


def _lora(size: int | None, spare: int, targets: list[nn.Module], seed: int) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(r=size or 1, lora_alpha=8, lora_dropout=0.0)


def _vera(size: int | None, spare: int, targets: list[nn.Module], seed: int) -> PeftConfig:
    from peft import VeraConfig

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A")  # the seed is saved, as in all our methods
        return VeraConfig(r=size or VERA_RANK, projection_prng_key=seed, save_projection=False, vera_dropout=0.0)


def _unilora(size: int | None, spare: int, targets: list[nn.Module], seed: int) -> PeftConfig:
    from peft import UniLoraConfig

    rank = 4
    entries = rank * sum(sum(_shape(target)) for target in targets)  # more values than this would have no effect
    return UniLoraConfig(r=rank, theta_d_length=size or min(spare, entries), proj_seed=seed, unilora_dropout=0.0)


def _fourierft(size: int | None, spare: int, targets: list[nn.Module], seed: int) -> PeftConfig:
    from peft import FourierFTConfig

    most = min(rows * columns for rows, columns in map(_shape, targets))
    frequencies = size or min(max(1, spare // len(targets)), most)
    return FourierFTConfig(n_frequency=frequencies, random_loc_seed=seed)


_CONFIGS: dict[str, Callable[[int | None, int, list[nn.Module], int], PeftConfig]] = {
    "lora": _lora,
    "vera": _vera,
    "unilora": _unilora,
    "fourierft": _fourierft,
}


def _bitfit(model: nn.Module, head: dict[str, Tensor]) -> nn.Module:
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")} - set(head)
    if not biases:
        raise ValueError(f"model: expected one with biases for BitFit, got {type(model).__name__}, which has none")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in biases or name in head)
    return model


class OfGroups(nn.Module):
    """Adds theta[group] / sqrt(size of the group) to each entry of a matrix. `groups` has the shape of the matrix."""

    def __init__(self, theta: nn.Parameter, norms: Tensor, groups: Tensor):
        super().__init__()
        self.theta = theta
        self.norms: Tensor
        self.groups: Tensor
        self.register_buffer("norms", norms, persistent=False)
        self.register_buffer("groups", groups, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.theta / self.norms)[self.groups]


def _gpart(model: nn.Module, head: dict[str, Tensor], size: int | None, seed: int) -> nn.Module:
    """GPart on the linear layers of the pretrained part, all of them, as published for large models."""
    targets = _targets(model, {})
    if not targets:
        raise ValueError(f"model: expected one with linear layers, got {type(model).__name__}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in head)
    spare = VALUES - sum(weight.numel() for weight in head.values())
    return partitioned(model, [f"{name}.weight" for name in targets], size or (spare if spare > 0 else VALUES), seed)


def partitioned(model: nn.Module, names: Iterable[str], dim: int, seed: int) -> nn.Module:
    """Changes a model so that parameters of these names move with one theta, as in GPart (arXiv 2605.14841).

    A hash puts each of their entries into one of `dim` groups (as many as there are entries at most), and
    theta[group] / sqrt(size of the group) is added to it: an isometry.
    """
    weights: dict[str, Tensor] = {name: model.get_parameter(name) for name in names}
    counts = [weight.numel() for weight in weights.values()]
    dim, device = min(dim, sum(counts)), next(iter(weights.values())).device
    groups = torch.from_numpy((splitmix64(seed, sum(counts)) % np.uint64(dim)).astype(np.int64)).to(device)
    norms = groups.bincount(minlength=dim).clamp(min=1).sqrt().float()
    theta = nn.Parameter(torch.zeros(dim, device=device))
    for (name, weight), own in zip(weights.items(), groups.split(counts), strict=True):
        weight.requires_grad_(False)
        module, _, last = name.rpartition(".")
        adds = OfGroups(theta, norms, own.view(weight.shape))
        parametrize.register_parametrization(model.get_submodule(module), last, adds)
    return model


def splitmix64(seed: int, count: int) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) of seed, seed + 1, ...: uint64 [count]."""
    x = np.uint64(seed) + np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _head(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the classification head: those outside the pretrained part. Empty if there is none."""
    pretrained = {id(weight) for weight in getattr(model, "base_model", model).parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) not in pretrained}


def _modules(model: nn.Module, head: dict[str, Tensor]) -> list[str]:
    """The names of the head's modules.

    Raises ValueError if another module's name ends with one of them, because peft would train that one too.
    """
    modules = sorted({name.split(".")[0] for name in head})
    for name, _ in model.named_modules():
        if "." in name and name.split(".")[0] not in modules and name.endswith(tuple(modules)):
            raise ValueError(f"model: expected the head's modules, {', '.join(modules)}, to differ in name from {name}")
    return modules


def _targets(model: Any, mapping: dict[str, Any]) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name: those that `mapping`, of peft, has for this type of model.

    They are query and value for most types. For an unknown type, all linear layers of the pretrained part.
    """
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for module in model.base_model.modules()}
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in inside
    }
    endings = mapping.get(model.config.model_type, [])
    if not isinstance(endings, list):  # a regular expression, for one type of model, which sees images too
        return linear
    suffixes = tuple(f".{ending}" for ending in endings)
    return {name: module for name, module in linear.items() if f".{name}".endswith(suffixes)} or linear


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return rows, columns
