"""Fine-tunes a text classifier with `HSAID` in plain PyTorch, for `hsaid train`: model, loop, accuracy, saved run.

The time of each part of a step is measured without changes to the model: when it is called, and around the ops of the
projection and its adjoint. The times of the parts add up to the time of the step.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from hsaid_kernels.app.architecture import MBERT_CONFIG, loading
from hsaid_kernels.app.data import Example
from hsaid_kernels.app.trained import RUN_FILE, described, read_run
from hsaid_kernels.fastfood import ops
from hsaid_kernels.wrapper.hsaid import HSAID

WARMUP = 0.1  # fraction of the steps in which the learning rate rises
MAX_NORM = 1.0  # the gradient is clipped to this norm
PARTS = ("data", "projection", "forward", "backward", "adjoint", "optimiser")  # the timed parts of a step, in order

Batch = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass
class Classifier:
    """Classifies texts into `labels`. `model` is a sequence classifier of transformers, wrapped in HSAID or not."""

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int  # in tokens; longer texts are truncated

    def encode(self, examples: Sequence[Example]) -> Batch:
        """The model's inputs: token ids and attention mask, int64 [examples, longest text], and labels [examples]."""
        batch = self._tokens([example.text for example in examples])
        labels = [self.labels.index(example.label) for example in examples]
        return batch | {"labels": torch.tensor(labels, device=_device(self.model))}

    def predict(self, texts: Sequence[str], batch_size: int = 128) -> list[str]:
        """The predicted label of every text. Puts the model into eval mode."""
        return [self.labels[label] for label in self.logits(texts, batch_size).argmax(-1).tolist()]

    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = 128) -> Tensor:
        """The model's outputs for every text, float32 [texts, labels] on the CPU. Puts the model into eval mode."""
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length need little padding
        found = torch.empty(len(texts), len(self.labels))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found[chosen] = self.model(**self._tokens([texts[i] for i in chosen])).logits.float().cpu()
        return found

    def _tokens(self, texts: list[str]) -> Batch:
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return dict(self.tokenizer(texts, **options).to(_device(self.model)))


def build_classifier(source: str, labels: Sequence[str], seed: int, max_length: int) -> Classifier:
    """A pretrained model in float32 on the CPU, with a new classification head for `labels`, initialized with `seed`.

    `source` is a directory, a hub name or `FALLBACK`. If the hub does not answer, the cached copy is used. `max_length`
    is in tokens. Raises ValueError if the weights cannot be loaded, or if `max_length` exceeds the model's number of
    positions.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with loading(source) as (path, options), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **names, **options)
    positions = getattr(model.config, "max_position_embeddings", max_length)
    if max_length > positions:
        raise ValueError(f"max_length: expected at most the model's {positions} positions, got {max_length}")
    if tokenizer.pad_token is None:  # GPT-2, Llama
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model, tokenizer, tuple(labels), max_length)


@dataclass(frozen=True)
class Step:
    loss: float
    seconds: dict[str, float]  # {part: seconds} for each of PARTS


def training_batches(
    classifier: Classifier, examples: Sequence[Example], batch_size: int, seed: int
) -> Iterator[Batch]:
    """Yields batches endlessly. Every pass over the examples is shuffled anew, determined by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    dataset = cast("torch.utils.data.Dataset[Example]", examples)  # DataLoader accepts any sequence
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, collate_fn=classifier.encode, generator=generator
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def training_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    dropout: bool = False,
    bits: int | None = None,
) -> Iterator[Step]:
    """Trains `model`, wrapped in HSAID or not, with AdamW, one step for each `Step` that it yields.

    Trains the parameters that have `requires_grad`; those of an HSAID are theta and the multipliers.

    The learning rate rises linearly to `lr` in the first tenth of the steps and then falls linearly to 0. There is no
    weight decay, because it would pull the multipliers towards 0 instead of 1. Dropout is off by default: so few
    parameters hardly overfit, and its noise slows training. `seed` determines dropout. With the same seed, batches and
    machine the losses are the same bit for bit. With `bits`, theta and the multipliers of an HSAID stay on levels, see
    `HSAID.rounded`.
    """
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(seed)  # dropout
    model.train(dropout)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    watch = _Stopwatch(_device(model))
    levels = nullcontext() if bits is None else cast(HSAID, model).rounded(optimizer, bits)
    with watch.around(model), levels:
        watch.switch("data")
        for batch in itertools.islice(batches, steps):
            watch.switch("projection")
            loss = model(**batch).loss
            watch.switch("backward")
            loss.backward()
            watch.switch("optimiser")
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield Step(loss.item(), watch.stop())
            watch.switch("data")


class _Stopwatch:
    """Measures the seconds of each part of a step. One part runs at a time, so the parts add up to the step."""

    def __init__(self, device: torch.device):
        self._device = device
        self._part, self._since = "", 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    def switch(self, part: str) -> None:
        """Ends the current part and begins `part`."""
        if self._device.type == "cuda":  # otherwise only kernel launches would be measured
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def stop(self) -> dict[str, float]:
        """Ends the current part. Returns the seconds since the last `stop`, for each of PARTS."""
        self.switch("")
        seconds = {part: self._seconds[part] for part in PARTS}
        self._seconds.clear()
        return seconds

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """A context manager, inside of which steps of the model are measured.

        The part is "forward" from where the model inside an HSAID is called, "projection" and "adjoint" while their ops
        run. A model without HSAID has no projection, and of a compiled one the ops cannot be told from the rest.
        """

        def called(module: nn.Module, args: tuple) -> None:
            self.switch("forward")

        inner = model.model if isinstance(model, HSAID) else model
        handle = inner.register_forward_pre_hook(called)
        plain = ops.fastfood_forward, ops.fastfood_adjoint
        if isinstance(model, HSAID):
            ops.fastfood_forward = self._measured("projection", ops.fastfood_forward)
            ops.fastfood_adjoint = self._measured("adjoint", ops.fastfood_adjoint)
        try:
            yield
        finally:
            handle.remove()
            ops.fastfood_forward, ops.fastfood_adjoint = plain

    def _measured(self, part: str, op: Callable[..., Result]) -> Callable[..., Result]:
        """The op, during which the part is `part`."""

        def run(*args: Any, **kwargs: Any) -> Result:
            before = self._part
            self.switch(part)
            try:
                return op(*args, **kwargs)
            finally:
                self.switch(before)

        return run


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the process on the CPU, of PyTorch's allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # on Linux; getrusage would include the parent's memory at the time of the fork
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Evaluation:
    """Predictions, their accuracy (0 to 1), and the accuracy for each language."""

    predictions: tuple[str, ...]
    accuracy: float
    by_language: dict[str, float]


def evaluate(classifier: Classifier, examples: Sequence[Example]) -> Evaluation:
    predictions = classifier.predict([example.text for example in examples])
    return _score(predictions, examples)


def majority_baseline(train: Sequence[Example], test: Sequence[Example]) -> Evaluation:
    """The result of always predicting the most frequent training label; of several, the first in alphabetical order."""
    count = Counter(sorted(example.label for example in train))
    return _score(count.most_common(1)[0][:1] * len(test), test)


def _score(predictions: Sequence[str], examples: Sequence[Example]) -> Evaluation:
    hits: dict[str, list[bool]] = defaultdict(list)
    for label, example in zip(predictions, examples, strict=True):
        hits[example.language].append(label == example.label)
    by_language = {language: sum(right) / len(right) for language, right in hits.items()}
    return Evaluation(tuple(predictions), sum(map(sum, hits.values())) / len(examples), by_language)


def save_trained(classifier: Classifier, directory: str | os.PathLike[str], **run: Any) -> None:
    """Writes the HSAID's checkpoint and a small JSON file with the other data that `load_trained` needs.

    `run` must contain `model` and `seed` as given to `build_classifier`. Other entries are stored too. Raises OSError
    if the files cannot be written.
    """
    run |= {"max_length": classifier.max_length, "labels": classifier.labels}
    hsaid = cast(HSAID, classifier.model)  # or a compiled one, which has the same attributes
    run["components"] = described(hsaid.partition)
    path = Path(directory, RUN_FILE)
    unfinished = path.with_name(f".{RUN_FILE}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The JSON file is written completely before the checkpoint is put in place, and renamed afterwards, because the
        # files are useless without each other.
        unfinished.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        hsaid.save_pretrained(directory)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_trained(directory: str | os.PathLike[str], model: str | None = None) -> Classifier:
    """The classifier that `hsaid train` saved, on the CPU, as in `load_trained("runs/train").predict(["Islande"])`.

    `model` is the directory or hub name of the pretrained weights; None means the one used in training. Raises what
    `read_run`, `build_classifier` and `HSAID.from_pretrained` raise, and ValueError if W0 (the pretrained weights or
    the new head) differs from that of training.
    """
    run = read_run(directory)
    classifier = build_classifier(model or run["model"], run["labels"], run["seed"], run["max_length"])
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "model: W0")
            classifier.model = HSAID.from_pretrained(directory, classifier.model)
    except UserWarning as warning:
        raise ValueError(str(warning)) from None
    return classifier


def build_mbert(seed: int) -> nn.Module:
    """The full mBERT architecture with random weights: 201 tensors, 177,854,978 weights."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**MBERT_CONFIG))


def hashed_batches(
    examples: Sequence[Example], device: torch.device, rows: int = 16, length: int = 16
) -> Iterator[Batch]:
    """Yields batches endlessly for timing mBERT on real text without its vocabulary.

    A token is a hash of four characters; the label is whether the example has the same label as the first one. Token
    ids and mask are int64 [rows, length] in every batch, so that the times of steps are comparable; labels are [rows].
    """
    for start in itertools.count(0, rows):
        chosen = [examples[i % len(examples)] for i in range(start, start + rows)]
        ids = torch.zeros(rows, length, dtype=torch.int64)
        for row, example in enumerate(chosen):
            pieces = [example.text[i : i + 4].encode() for i in range(0, len(example.text), 4)][:length]
            ids[row, : len(pieces)] = torch.tensor(
                [1 + zlib.crc32(p) % (MBERT_CONFIG["vocab_size"] - 1) for p in pieces]
            )
        labels = torch.tensor([int(example.label == examples[0].label) for example in chosen])
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
