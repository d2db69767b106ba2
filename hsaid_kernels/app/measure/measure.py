"""`measure`: the intrinsic dimension of a task, for any model and training function."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hsaid_kernels.app.measure.report import Measurement
from hsaid_kernels.app.measure.runs import BASELINE, Design, split_method
from hsaid_kernels.app.measure.schedule import Outcomes, Schedule
from hsaid_kernels.app.measure.storage import sqlite
from hsaid_kernels.app.measure.study import Study
from hsaid_kernels.app.measure.workers import Job, Report, Train, work, work_in_processes
from hsaid_kernels.app.terminal import run_progress
from hsaid_kernels.files import replace_files
from hsaid_kernels.hierarchy import Hierarchy

DEFAULT_NAME = "measure"
METHODS = ("did", "said", "hsaid-3")
DIMS = (100, 300, 1000, 3000, 10_000)
# Where the search for a learning rate starts: AdamW on pretrained models. "theta" is for d = 1,000.
RATES = {BASELINE: 1e-4, "theta": 0.3, "lora": 0.01, "vera": 0.03, "unilora": 0.03, "fourierft": 0.3, "bitfit": 0.01}
RATES["gpart"] = 0.1
RESULTS_FILE, TABLE_FILE, PICTURE_FILE, BOUND_FILE = "results.json", "table.md", "dimension.png", "bound.png"


def measure(
    model: nn.Module,
    train: Train,
    *,
    methods: Sequence[str] = METHODS,
    dims: Sequence[int] = DIMS,
    seeds: int = 3,
    threshold: float = 0.9,
    refine: int = 2,
    compare: Sequence[str] = (),
    rates: Mapping[str, float] | None = None,
    chance: float = 0.0,
    settings: Mapping[str, Any] | None = None,
    out: str | Path = "runs/measure",
    storage: str | None = None,
    name: str = DEFAULT_NAME,
    workers: int = 1,
    threads: int | None = None,
    title: str = "",
    labels: Mapping[str, str] | None = None,
) -> Measurement:
    """Measures the intrinsic dimension of a task: the smallest d at which training reaches 90% of full fine-tuning.

    Runs `train` for the baseline (all weights), and for each method over a grid of d, with several seeds, each at the
    learning rate with the best validation score. The study goes on where it was left if it exists already, and other
    processes, also on other machines, may work on it at the same time with the same call. Writes table.md, results.json
    and dimension.png to `out`, and bound.png if the scores have what bounds are made of. Equivalent to `hsaid measure`
    for a text classifier; docs/measuring.md has the protocol.

    Args:
        model: the model that is measured, for the names and shapes of its weights; it is neither trained nor changed.
        train: the training function. It gets a `Run`, builds a new model with its seed, wraps it by `run.wrap(model)`,
            trains with peak learning rate `run.lr`, and returns `Scores`. It raises `Diverged` if the loss is not
            finite. The same run should give the same scores.
        methods: partitions: "did", "said", "hsaid-3" or levels as in "L1+L2|L3|L4". Options of `HSAID` for this method
            alone may follow: "did:rademacher", "did:all", "did:one:1024" (diagonal, chunks, width).
        dims: the grid of d, increasing. A method is measured at those above its number of multipliers.
        seeds: number of seeds, which are 0, 1, ...
        threshold: share of the baseline's test score that defines the dimension.
        refine: how many d are added for each method, one after another, where its curve crosses the threshold.
        compare: methods of PEFT to measure beside these: "lora", "vera", "unilora", "fourierft", "bitfit", and GPart,
            "gpart", also with their size, as in "lora:8" (`adapted`).
        rates: {method: learning rate} at which the search for the best rate starts, for "full", methods of PEFT, and
            "theta" for all partitions (at d = 1,000; it falls as 1 / sqrt(d)). The search goes on as far as needed.
        chance: the test score that needs no training, which the baseline must beat.
        settings: whatever else determines the scores, as JSON: data, steps, batch size. A study that was made with
            other settings is refused.
        out: directory for the default storage, the results and checkpoints; the latter two, with another `name`, in a
            directory of that name in it.
        storage: where Optuna keeps the study: a SQLAlchemy URL such as "postgresql://user@host/database", or
            "journal:" and a file on a disk that all machines share. None means an SQLite file in `out`.
        name: the study's name in the storage.
        workers: number of processes to train in. More than 1 needs a `train` at the top level of a module; tensors that
            it holds, such as those of a pretrained model, get into shared memory.
        threads: CPU threads of each worker. None means all for one worker, else an equal share.
        title: of the picture.
        labels: {method: what it is called in table and picture}, where it has a name of its own.

    Raises ValueError or TypeError for arguments that cannot be right, ValueError for a study of other settings and
    for a baseline whose share is within `chance`; OSError if the storage does not answer or a file cannot be written;
    and whatever `train` raises.
    """
    design = design_of(
        model,
        methods=methods,
        dims=dims,
        seeds=seeds,
        threshold=threshold,
        refine=refine,
        compare=compare,
        rates=rates or {},
    )
    storage, out = storage or default_storage(Path(out)), directory_of(Path(out), name)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(storage, name, {**(settings or {}), "tensors": described(model)})
    job = Job(train, Schedule(design), storage, name, out / "runs", chance, threads)
    remember(study, job, title, labels or {})
    run_study(job, workers)
    return write_results(study, design, out)


def design_of(
    model: nn.Module,
    *,
    methods: Sequence[str],
    dims: Sequence[int],
    compare: Sequence[str],
    rates: Mapping[str, float],
    **options: Any,
) -> Design:
    """The design of a study of `model`. Arguments and exceptions are those of `measure`."""
    if isinstance(methods, str):
        raise TypeError(f"methods: expected a list of partitions, got the string {methods!r}")
    counts = {method: num_multipliers(model, split_method(method)[0]) for method in methods}
    if compare:
        from hsaid_kernels.app.measure.compare import check_methods

        check_methods(compare)
    starts = {method: RATES[method.partition(":")[0]] for method in (BASELINE, "theta", *compare)}
    for method, lr in rates.items():
        if method not in starts:
            raise ValueError(f"rates: expected a rate for some of {', '.join(starts)}, got one for {method!r}")
        if not 1e-7 <= lr <= 1e3:
            raise ValueError(f"rates: expected rates from 1e-7 to 1,000, got {lr} for {method!r}")
    starts |= rates
    return Design(
        methods=tuple(methods),
        dims=tuple(dims),
        compare=tuple(compare),
        rates=starts,
        multipliers=counts,
        **options,
    )


def num_multipliers(model: nn.Module, partition: str) -> int:
    """The number of multipliers of a partition of `model`, whose parameters may be on any device."""
    return (
        Hierarchy.from_model(model, heads="L5" in partition, experts="L6" in partition)
        .partition(partition)
        .num_multipliers
    )


def described(model: nn.Module) -> str:
    """The number of a model's tensors and weights, as a text."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return f"{len(sizes)} tensors, {sum(sizes):,} weights"


def directory_of(out: Path, name: str) -> Path:
    """Where a study's results go: a study with a name of its own has a directory of its own in `out`."""
    return out if name == DEFAULT_NAME else out / name


def default_storage(out: Path) -> str:
    """The address of the SQLite file in `out`. Raises ValueError for a path that such an address cannot hold."""
    return sqlite(out / "study.db")


def remember(study: Study, job: Job, title: str, labels: Mapping[str, str]) -> None:
    """Stores in the study what `write_results` needs."""
    study.note("chance", job.chance)
    study.note("title", title)
    study.note("labels", labels)
    study.design = job.schedule.design  # the last: where it is, the others are


def run_study(job: Job, workers: int) -> None:
    """Takes part in a study until it is complete, in `workers` processes, with a progress bar on stderr."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    threads = torch.get_num_threads()
    with _progress(job) as report:
        if workers > 1:
            share = job.threads or max(1, (os.cpu_count() or 1) // workers)
            work_in_processes(replace(job, threads=share), workers, report)
            return
        try:
            torch.set_num_threads(job.threads or threads)
            work(job, report)
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _progress(job: Job) -> Iterator[Report]:
    with run_progress("measuring") as show:

        def report(outcomes: Outcomes, latest: str) -> None:
            missing, later = job.schedule.left(outcomes)
            show(len(outcomes), len(missing) + later, latest)

        yield report


def write_results(study: Study, design: Design, out: Path) -> Measurement:
    """Writes table, JSON and picture of what has finished of a design to `out`, and returns the results."""
    outcomes, _ = study.read()
    measurement = Measurement.of(design, outcomes, study.noted("chance"), study.noted("labels"))
    results = {"study": study.name, "settings": study.settings, **measurement.to_json()}
    texts = {RESULTS_FILE: json.dumps(results, indent=1, ensure_ascii=False), TABLE_FILE: measurement.table()}
    files = {out / file: f"{text}\n".encode() for file, text in texts.items()}
    out.mkdir(parents=True, exist_ok=True)
    files[out / PICTURE_FILE] = measurement.picture("png", study.noted("title"))
    if measurement.certificates:
        files[out / BOUND_FILE] = measurement.bound_picture("png", study.noted("title"))
    replace_files(files)
    return measurement
