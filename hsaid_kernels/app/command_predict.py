"""`hsaid predict`: labels for texts, by a classifier that `hsaid train` has trained."""

from __future__ import annotations

import argparse
import json

import torch

from hsaid_kernels.app.data import read_texts
from hsaid_kernels.app.terminal import user_input
from hsaid_kernels.app.training import load_trained
from hsaid_kernels.fastfood.ops import choose_device

TEXTS = 1024  # at a time, so that lines come out while others are computed


def predict(arguments: argparse.Namespace) -> None:
    """Prints a line for each text of `arguments.data`: its label, and probabilities.

    Lines are "text, label, probability" separated by tabs, below a line of these names, or JSON objects that have the
    probabilities of all labels. Raises UsageError for invalid input.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with user_input():
        texts = read_texts(arguments.data, text=arguments.text_column)
        classifier = load_trained(arguments.checkpoint, arguments.model)
    classifier.model.to(choose_device())
    table = arguments.format == "tsv"
    if table:
        print("text", "label", "probability", sep="\t")
    for start in range(0, len(texts), TEXTS):
        chosen = texts[start : start + TEXTS]
        for text, shares in zip(chosen, classifier.logits(chosen).softmax(-1).tolist(), strict=True):
            best = max(range(len(shares)), key=shares.__getitem__)
            label = classifier.labels[best]
            if table:
                # A text of a csv file may have tabs and line breaks.
                print(*(" ".join(field.split()) for field in (text, label)), f"{shares[best]:.4f}", sep="\t")
                continue
            found = {name: round(share, 6) for name, share in zip(classifier.labels, shares, strict=True)}
            print(json.dumps({"text": text, "label": label, "probabilities": found}, ensure_ascii=False))
