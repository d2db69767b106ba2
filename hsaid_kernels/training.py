"""The parts of `hsaid train` for use in scripts: classifier, batches, steps, evaluation (docs/training.md)."""

from hsaid_kernels.app.architecture import FALLBACK, MBERT, build_architecture
from hsaid_kernels.app.training import (
    Classifier,
    Evaluation,
    Step,
    build_classifier,
    build_mbert,
    evaluate,
    load_trained,
    majority_baseline,
    save_trained,
    training_batches,
    training_steps,
)

__all__ = [
    "FALLBACK",
    "MBERT",
    "Classifier",
    "Evaluation",
    "Step",
    "build_architecture",
    "build_classifier",
    "build_mbert",
    "evaluate",
    "load_trained",
    "majority_baseline",
    "save_trained",
    "training_batches",
    "training_steps",
]
