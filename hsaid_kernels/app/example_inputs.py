"""`example_inputs`: random inputs for a model of transformers, from its configuration and the arguments it takes.

A few attempts, of which the first counts that the model runs on: token ids, images, spectrograms, sound.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 12
GRIDS = ("grid_thw", "image_grid_thw", "image_grid_hws", "grid_hw", "grid_hws")


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that the model runs on, on the CPU. Raises ValueError if no attempt succeeds."""
    reasons = []
    without = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for inputs in map(without.__or__, _attempts(model)):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model(**inputs)
        except Exception as error:  # whatever a model raises for inputs that are not its own
            reasons.append(f"{', '.join(inputs)}: {type(error).__name__} {str(error).strip()[:100]}")
        else:
            return inputs
    tried = "; ".join(reasons[-2:])
    raise ValueError(
        f"model: expected one whose inputs can be made from its configuration, got a {type(model).__name__} "
        f"({tried or 'with other arguments'}): call hsaid_kernels.heads.check(model, inputs)"
    )


def _attempts(model: nn.Module) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    makers = {
        **dict.fromkeys(("input_ids", "decoder_input_ids"), _ids),
        **dict.fromkeys(("pixel_values", "pixel_values_videos"), _images),
        **dict.fromkeys(("input_features", "input_values", "hidden_states", "inputs_embeds", "inputs"), _features),
        "bbox": _boxes,
    }
    first = [
        key for key in dict.fromkeys((main, *required, "input_ids", *makers)) if key in makers and key in parameters
    ]
    text = [key for key in ("input_ids", "decoder_input_ids", "bbox") if key in parameters]
    images = [key for key in ("pixel_values",) if key in parameters]
    groups: list[list[str]] = [text] if text and main in ("input_ids", None) else []
    groups += [text + images] * bool(text and images) + [[key] for key in first]
    groups += [[key, "decoder_input_ids"] for key in first if "decoder_input_ids" in parameters]
    groups += [[key for key in required if key in makers]]
    if "pixel_position_ids" in parameters:  # patches, each with its place
        edge = _number(config, "patch_size", default=8)
        rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
        places = torch.stack([columns, rows], -1).view(1, 36, 2)
        yield {"pixel_values": torch.rand(1, 36, 3 * edge * edge, generator=generator), "pixel_position_ids": places}
    # Gemma 3n masks what is not there, Gemma 4 what is.
    for sound, mask, there in (("audio_mel", "audio_mel_mask", False), ("input_features", "attention_mask", True)):
        if sound in parameters and mask in parameters:
            features = torch.randn(1, 64, _number(config, "input_feat_size", default=128), generator=generator)
            yield {sound: features, mask: torch.full((1, 64), there)}
    grids = [
        key for key in ("grid_thw", "image_grid_thw", "image_grid_hws", "grid_hw", "grid_hws") if key in parameters
    ]
    if grids:  # patches of an image, with the size of the image in patches
        edge = _number(config, "patch_size", default=8)
        numel = _number(config, "num_channels", "in_channels", default=3) * edge * edge
        name = next((key for key in parameters if key in ("pixel_values", "hidden_states", "pixel_values_videos")), "x")
        for times in (_number(config, "temporal_patch_size", default=1), 1):
            patches = torch.randn(16, times * numel, generator=generator)
            grid = [1, 4, 4] if grids[0].endswith("thw") else [4, 4]
            yield {name: patches, grids[0]: torch.tensor([grid])}
    for keys in filter(None, map(list, dict.fromkeys(map(tuple, groups)))):
        choices = [list(makers[key](config, parameters, generator)) for key in keys]
        for values in itertools.islice(itertools.product(*choices), 8):
            yield dict(zip(keys, values))


def _number(config: Any, *keys: str, default: int) -> int:
    """The first of these attributes of the configuration, or of a part of it, that is a number."""
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))] if config else []
    for part in parts:
        for key in keys:
            value = getattr(part, key, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return default


def _ids(config: Any, parameters: Any, generator: torch.Generator) -> Iterator[Tensor]:
    vocabulary = _number(config, "vocab_size", default=100)
    low = min(10, vocabulary // 4)
    yield torch.randint(low, max(low + 1, vocabulary * 3 // 4), (1, TOKENS), generator=generator)


def _boxes(config: Any, parameters: Any, generator: torch.Generator) -> Iterator[Tensor]:
    corners = torch.randint(0, 50, (1, TOKENS, 4), generator=generator)
    corners[..., 2:] += 50
    yield corners
    yield corners.float() / 100


def _images(config: Any, parameters: Any, generator: torch.Generator) -> Iterator[Tensor]:
    size = _number(config, "image_size", "input_size", "img_size", default=32)
    channels = _number(config, "num_channels", "in_channels", "in_chans", default=3)
    frames = _number(config, "num_frames", "frames_per_clip", default=2)
    patch = _number(config, "patch_size", default=8)
    yield torch.randn(1, channels, size, size, generator=generator)
    yield torch.randn(1, frames, channels, size, size, generator=generator)
    yield torch.randn(1, channels, 2 * size, 2 * size, generator=generator)
    yield torch.randn(1, 16, channels * patch * patch, generator=generator)


def _features(config: Any, parameters: Any, generator: torch.Generator) -> Iterator[Tensor]:
    bins = _number(config, "num_mel_bins", "n_mels", "feature_size", "input_dim", "num_mel_channels", default=16)
    width = _number(config, "hidden_size", "d_model", "n_embd", "embed_dim", "dim", default=64)
    length = 2 * _number(config, "max_source_positions", default=16)
    yield torch.randn(1, length, bins, generator=generator)
    yield torch.randn(1, bins, length, generator=generator)
    yield torch.randn(1, _number(config, "max_length", default=32), bins, generator=generator)
    yield torch.randn(1, 4000, generator=generator)
    yield torch.randn(1, TOKENS, width, generator=generator)
    yield torch.randn(1, 1, 4000, generator=generator)
