"""`measure` around a training loop that is not ours, and a study in a dashboard that is not ours."""

import json
import threading
from urllib.request import urlopen
from wsgiref.simple_server import make_server

import datasets
import pytest
import torch
import transformers
from models import bert

from hsaid_kernels.measure import Run, Scores, measure

optuna_dashboard = pytest.importorskip("optuna_dashboard")

OPTIONS = {"methods": ("did",), "dims": (20, 100), "seeds": 2, "refine": 0, "rates": {"full": 3e-3, "theta": 0.3}}


def examples(seed: int, count: int) -> datasets.Dataset:
    """Eight tokens each; the label is whether one of the first two, which mean yes and no, occurs more often."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, (count, 7), generator=random)  # an odd number: there is no tie
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids.sum(1) > 3).long().tolist()})


def accuracy(predicted: transformers.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def train(run: Run) -> Scores:
    """transformers' Trainer, as its documentation has it."""
    torch.manual_seed(run.seed)
    model = run.wrap(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2))
    arguments = transformers.TrainingArguments(
        output_dir=run.directory,
        learning_rate=run.lr,
        max_steps=40,
        per_device_train_batch_size=16,
        seed=run.seed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples(0, 256), compute_metrics=accuracy)
    trainer.train()
    validation, test = (trainer.evaluate(examples(part, 256))["eval_accuracy"] for part in (1, 2))
    return Scores(validation, test)


def test_transformers_trainer_and_optuna_dashboard(tmp_path):
    found = measure(bert(), train, out=tmp_path, chance=0.55, **OPTIONS)
    assert found.left == 0 and min(found.baseline.scores.values()) > 0.7
    low, high = found.curves["did"]
    assert sum(high.scores.values()) > sum(low.scores.values()) > 0  # 100 numbers reach more than 20

    app = optuna_dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}")
    with make_server("127.0.0.1", 0, app) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with urlopen(f"http://127.0.0.1:{server.server_port}/api/studies/1?after=0", timeout=60) as answer:
            shown = json.load(answer)
    assert len([trial for trial in shown["trials"] if trial["state"] == "Complete"]) == found.runs
    assert {name["name"] for name in shown["union_search_space"]} >= {"lr", "d", "seed"}
