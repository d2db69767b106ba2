"""Fine-tuning a text classifier through `HSAID` in plain torch, for `hsaid train`: model, loop, accuracy, saved run.

A step is timed without touching the model: hooks tell when the projection is done and when its adjoint starts and ends,
so that the parts of a step add up to the whole of it.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsaid_kernels.app.architecture import MBERT_CONFIG, loading
from hsaid_kernels.app.data import Example
from hsaid_kernels.app.trained import RUN_FILE, described, read_run
from hsaid_kernels.wrapper.hsaid import HSAID

WARMUP = 0.1  # of the steps
MAX_NORM = 1.0  # of the gradient
PARTS = ("data", "projection", "forward", "backward", "adjoint", "optimiser")  # of a step, in this order

Batch = dict[str, Tensor]


@dataclass
class Classifier:
    """Text in, one of `labels` out; `model` is an HSAID or any other sequence classifier of transformers."""

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int  # tokens; longer texts are cut

    def encode(self, examples: Sequence[Example]) -> Batch:
        """Token ids and mask [examples, longest], labels [examples]."""
        batch = self._tokens([example.text for example in examples])
        labels = [self.labels.index(example.label) for example in examples]
        return batch | {"labels": torch.tensor(labels, device=_device(self.model))}

    @torch.no_grad()
    def predict(self, texts: Sequence[str], batch_size: int = 128) -> list[str]:
        """A label for every text."""
        self.model.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length need little padding
        predicted = [""] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            best = self.model(**self._tokens([texts[i] for i in chosen])).logits.argmax(-1)
            for i, label in zip(chosen, best.tolist(), strict=True):
                predicted[i] = self.labels[label]
        return predicted

    def _tokens(self, texts: list[str]) -> Batch:
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        return dict(self.tokenizer(texts, **options).to(_device(self.model)))


def build_classifier(source: str, labels: Sequence[str], seed: int, max_length: int) -> Classifier:
    """A pretrained model in float32 on the CPU, with a head for `labels` that is drawn with `seed`.

    `source` is a directory, a hub name (its cached copy where the hub does not answer) or `FALLBACK`. Raises ValueError
    where the weights cannot be had, and for more tokens than the model has positions.
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
    seconds: dict[str, float]  # for each of PARTS


def training_batches(
    classifier: Classifier, examples: Sequence[Example], batch_size: int, seed: int
) -> Iterator[Batch]:
    """Batches without end: every pass over the examples is in an order of its own, decided by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    dataset = cast("torch.utils.data.Dataset[Example]", examples)  # a sequence is one: it has items and a length
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, collate_fn=classifier.encode, generator=generator
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def training_steps(
    hsaid: HSAID, batches: Iterable[Batch], *, steps: int, lr: float, seed: int = 0, dropout: bool = False
) -> Iterator[Step]:
    """Trains theta and the multipliers by AdamW, a step per item; the learning rate rises for a tenth of the steps,
    then falls to 0.

    No weight decay: it would draw the multipliers to 0, which is not where they start. No dropout by default: so few
    numbers hardly overfit, and its noise slows them down. The losses are the same to the last bit for the same seed,
    batches and machine.
    """
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(seed)  # dropout
    hsaid.train(dropout)
    optimizer = torch.optim.AdamW(hsaid.parameters(), lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    watch = _Stopwatch(_device(hsaid))
    with watch.around(hsaid):
        watch.switch("data")
        for batch in itertools.islice(batches, steps):
            watch.switch("projection")
            loss = hsaid(**batch).loss
            watch.switch("backward")
            loss.backward()
            watch.switch("optimiser")
            nn.utils.clip_grad_norm_(hsaid.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield Step(loss.item(), watch.stop())
            watch.switch("data")


class _Stopwatch:
    """Seconds for each part of a step; one part runs at a time, so they add up to the step."""

    def __init__(self, device: torch.device):
        self._device = device
        self._part, self._since = "", 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    def switch(self, part: str) -> None:
        """The running part ends, `part` begins."""
        if self._device.type == "cuda":  # or the time would be that of the launches
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def stop(self) -> dict[str, float]:
        """Seconds since the last stop, for each of PARTS."""
        self.switch("")
        seconds = {part: self._seconds[part] for part in PARTS}
        self._seconds.clear()
        return seconds

    @contextmanager
    def around(self, hsaid: HSAID) -> Iterator[None]:
        """In here "forward" begins when the model inside is called, and "adjoint" is the backward of the projection."""

        def projected(model: nn.Module, args: tuple) -> None:
            self.switch("forward")

        def computed(model: nn.Module, args: tuple, output: Any) -> None:
            nodes = {weight.grad_fn for weight in model.parameters()}  # one for each block of the model
            for node in filter(None, nodes):
                node.register_prehook(lambda _: self.switch("adjoint"))
                node.register_hook(lambda *_: self.switch("backward"))

        handles = [hsaid.model.register_forward_pre_hook(projected), hsaid.model.register_forward_hook(computed)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def peak_memory(device: torch.device) -> int:
    """Bytes that were in use at once: the process's on the CPU, torch's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # Linux; getrusage would count what the parent held when it forked
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Evaluation:
    """Predictions, the part of them that is right, and the same for each language."""

    predictions: tuple[str, ...]
    accuracy: float
    by_language: dict[str, float]


def evaluate(classifier: Classifier, examples: Sequence[Example]) -> Evaluation:
    predictions = classifier.predict([example.text for example in examples])
    return _score(predictions, examples)


def majority_baseline(train: Sequence[Example], test: Sequence[Example]) -> Evaluation:
    """Always the label that is most frequent in training, the first of these by name."""
    count = Counter(sorted(example.label for example in train))
    return _score(count.most_common(1)[0][:1] * len(test), test)


def _score(predictions: Sequence[str], examples: Sequence[Example]) -> Evaluation:
    hits: dict[str, list[bool]] = defaultdict(list)
    for label, example in zip(predictions, examples, strict=True):
        hits[example.language].append(label == example.label)
    by_language = {language: sum(right) / len(right) for language, right in hits.items()}
    return Evaluation(tuple(predictions), sum(map(sum, hits.values())) / len(examples), by_language)


def save_trained(classifier: Classifier, directory: str | os.PathLike[str], **run: Any) -> None:
    """Writes the HSAID's checkpoint and a small JSON file with what else `load_trained` needs.

    `run` must have `model` and `seed` as given to `build_classifier`, and may have more to remember.
    """
    run |= {"max_length": classifier.max_length, "labels": classifier.labels}
    hsaid = cast(HSAID, classifier.model)  # or what compiles one, and has its attributes
    run["components"] = described(hsaid.partition)
    path = Path(directory, RUN_FILE)
    unfinished = path.with_name(f".{RUN_FILE}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Both files are on the disk before either is put in place: they mean nothing without one another.
        unfinished.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        hsaid.save_pretrained(directory)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_trained(directory: str | os.PathLike[str], model: str | None = None) -> Classifier:
    """The classifier that `hsaid train` saved, on the CPU: `load_trained("runs/train").predict(["Islande"])`.

    `model` is where its pretrained weights are now, if not where they were. Raises as `read_run`, `build_classifier`
    and `HSAID.from_pretrained` do, and ValueError for W0 (pretrained, or the new head) other than what was trained
    from.
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
    """The full mBERT architecture with fresh weights: 201 tensors, 177,854,978 weights."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**MBERT_CONFIG))


def hashed_batches(
    examples: Sequence[Example], device: torch.device, rows: int = 16, length: int = 16
) -> Iterator[Batch]:
    """Real text for mBERT without its vocabulary, for timing: a token is the hash of four letters, the label yes or no.

    Ids and mask are [rows, length] in every batch, so that steps can be compared.
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
