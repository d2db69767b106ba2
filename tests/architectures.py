"""Checks the heads of every type of model that transformers builds from a tiny configuration, and writes the table of
docs/heads.md.

    python tests/architectures.py [--jobs 2] [--out FILE] [--report FILE] [type ...]

Every type is built twice, with as many key-value heads as heads, and with half of them in heads of another size than
usual; `hsaid_kernels.heads.check` judges each attention module, in the whole model or else in the part of it that takes
inputs of its own. --out keeps what was found, a line of JSON for each model. --report writes the table of such a file.
"""

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(__file__))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny import tiny_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # noqa: E402

from hsaid_kernels.app.example_inputs import example_inputs  # noqa: E402
from hsaid_kernels.heads import check  # noqa: E402
from hsaid_kernels.hierarchy.attention import survey  # noqa: E402

VARIANTS = {"groups": dict(groups=2, size=8), "plain": {}}
SECONDS = 120  # for a model


class TimeIsUp(BaseException):
    pass


def audit(kind: str, variant: str) -> dict:
    """What is found of a type: {"class", "modules": {name: [class, layout, heads, verdict, why]}} or an error."""
    model = tiny_model(kind, **VARIANTS[variant])
    found = survey(model)
    record: dict = {"class": type(model).__name__}
    layouts = {attention.name: str(attention.layout) for attention in found.divided}
    reached: dict[str, list] = {}
    parts = [name for name, module in model.named_modules() if name == "" or isinstance(module, transformers.PreTrainedModel)]
    modules = [name for name in layouts]
    for prefix in [*parts, *modules]:
        inside = [name for name in layouts if not prefix or name == prefix or name.startswith(f"{prefix}.")]
        if all(reached.get(name, ["", "", 0, "not run"])[3] != "not run" for name in inside):
            continue
        part = model.get_submodule(prefix)
        try:
            inputs = example_inputs(part) if prefix in parts else alone(part)
            for checked in check(part, inputs):
                name = f"{prefix}.{checked.name}".strip(".")
                if name in layouts and reached.get(name, ["", "", 0, "not run"])[3] == "not run":
                    reached[name] = [checked.kind, layouts[name], checked.heads, checked.verdict, checked.why]
        except Exception as error:
            record.setdefault("errors", []).append(f"{prefix}: {type(error).__name__}: {str(error)[:200]}")
    for attention in found.divided:
        kind_of = type(model.get_submodule(attention.name)).__name__
        reached.setdefault(attention.name, [kind_of, layouts[attention.name], attention.heads, "not run", "no inputs"])
    for name, why in found.whole.items():
        reached[name] = [type(model.get_submodule(name)).__name__, "", 0, "whole", why]
    record["modules"] = reached
    return record


def alone(module: nn.Module) -> dict:
    """Inputs of an attention module by itself, for those that take hidden states only."""
    weight = next(parameter for parameter in module.parameters() if parameter.dim() > 1)
    width = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
    states = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(0))
    for inputs in ({"hidden_states": states}, {"hidden_state": states}, {"query": states, "key": states, "value": states}):
        try:
            with torch.no_grad():
                module(**inputs)
            return inputs
        except Exception:
            continue
    raise ValueError("other inputs")


def child(kind: str, variant: str, path: str) -> None:
    def up(*_):
        raise TimeIsUp

    signal.signal(signal.SIGALRM, up)
    signal.alarm(SECONDS)
    record = {"type": kind, "variant": variant}
    begin = time.time()
    try:
        record |= audit(kind, variant)
    except TimeIsUp:
        record["error"] = f"longer than {SECONDS} s"
    except BaseException as error:
        record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    signal.alarm(0)
    record["seconds"] = round(time.time() - begin, 1)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
    verdicts = Counter(module[3] for module in record.get("modules", {}).values())
    print(kind, variant, dict(verdicts), record.get("error", ""), record["seconds"], flush=True)
    for name, module in record.get("modules", {}).items():
        if module[3] == "wrong":
            print("    WRONG", name, module[0], module[4], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="build/architectures.jsonl")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    todo = [(kind, variant) for kind in arguments.types or MODEL_MAPPING_NAMES for variant in arguments.variants.split(",")]
    audit("bert", "plain")  # so that what all models import is there before the first fork
    audit("vit", "plain")
    running = 0
    while todo or running:
        while todo and running < arguments.jobs:
            kind, variant = todo.pop(0)
            running += 1
            if os.fork() == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                try:
                    child(kind, variant, arguments.out)
                finally:
                    os._exit(0)
        os.wait()
        running -= 1


if __name__ == "__main__":
    main()
