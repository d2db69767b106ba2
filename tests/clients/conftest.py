"""Beside a torch without CUDA, torchvision's wheel for CUDA cannot load its operators; timm needs only its Python."""

import importlib

import torch


def torchvision_without_operators() -> list[torch.library.Library]:
    """Declares the operators that torchvision registers at import, and does not call, where it has not loaded them.

    Without this, neither torchvision nor what looks for it (transformers, torchmetrics, timm) can be imported.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return []  # the tests that need it are skipped
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return [library]
    return []


DECLARED = torchvision_without_operators()  # until the process ends: a library that is freed takes its operators along
