"""Checks the heads of every type of model that transformers builds from a tiny configuration, and writes the table of
docs/heads.md.

    python tests/architectures.py [--jobs 2] [--out FILE] [--report FILE] [type ...]

Every type is built twice, with as many key-value heads as heads, and with half of them in heads of another size than
usual; `hsaid_kernels.heads.check` judges each attention module, in the whole model or else in the part of it that takes
inputs of its own, or else alone. --out keeps what was found, a line of JSON for each model; the newest one counts.
--report writes the table of such a file into docs/heads.md.
"""

import argparse
import inspect
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
from hsaid_kernels.hierarchy.attention import Attention, survey  # noqa: E402

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
    parts = [
        name for name, module in model.named_modules() if name == "" or isinstance(module, transformers.PreTrainedModel)
    ]
    found_at = {attention.name: attention for attention in found.divided}
    alone_at = {around: name for name in layouts for around in (name.rpartition(".")[0], name)}
    for prefix in dict.fromkeys([*parts, *sorted(alone_at, key=len, reverse=True)]):
        inside = [name for name in layouts if not prefix or name == prefix or name.startswith(f"{prefix}.")]
        if all(reached.get(name, ["", "", 0, "not run"])[3] != "not run" for name in inside):
            continue
        part = model.get_submodule(prefix)
        try:
            if prefix in parts:
                results = check(part, example_inputs(part))
            else:
                part = First(part)
                results = check(part, alone(part, found_at[alone_at[prefix]]))
            for checked in results:
                name = f"{prefix}.{checked.name.removeprefix('module').strip('.')}".strip(".")
                if prefix in parts:
                    name = f"{prefix}.{checked.name}".strip(".")
                if checked.verdict == "whole":
                    continue
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


class First(nn.Module):
    """A module of which only the first result counts: others are attention weights."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        results = self.module(**inputs)
        return results[0] if isinstance(results, tuple) else results


def alone(part: First, attention: Attention) -> dict:
    """Inputs of an attention module by itself, made by the names of its arguments."""
    parameters = inspect.signature(part.module.forward).parameters
    generator = torch.Generator().manual_seed(0)
    widths = {bands.role: bands.shape[1 - bands.dim] for bands in attention.bands if len(bands.shape) == 2}
    width = widths.get("query", next(iter(widths.values())))
    size = attention.head_dim
    reasons = []
    for shape in ((1, 6, width), (6, width), (1, 4, 4, width), (1, 16, width)):
        if len(shape) == 4 and "position_embeddings" in parameters:
            continue
        length = shape[-2]
        rotary = tuple(torch.randn(*shape[:-2], length, size, generator=generator) for _ in range(2))
        others = (*shape[:-2], 5, widths.get("key", width))
        known = {
            **dict.fromkeys(("hidden_states", "hidden_state", "query", "queries", "x", "input_tensor"), shape),
            **dict.fromkeys(("key", "value", "encoder_hidden_states", "key_value_states", "current_states"), others),
            **dict.fromkeys(("cross_attention_states", "context", "latents", "kv_states"), others),
        }
        inputs: dict = {}
        for name, parameter in parameters.items():
            if name in known:
                inputs[name] = torch.randn(*known[name], generator=generator)
            elif name in ("position_embeddings", "rotary_pos_emb", "position_embedding"):
                inputs[name] = rotary
            elif name == "cu_seqlens":
                inputs[name] = torch.tensor([0, length], dtype=torch.int32)
            elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                inputs[name] = None
        plain = {name: value for name, value in inputs.items() if name not in ("position_embeddings", "rotary_pos_emb")}
        own = {name: value for name, value in plain.items() if known.get(name) != others}
        by_head = {"position_embeddings": tuple(torch.randn(1, attention.heads, size) for _ in range(2))}
        for some in (inputs, inputs | by_head, plain, own, own | {"position_embeddings": None}):
            try:
                with torch.no_grad():
                    part(**some)
                return some
            except Exception as error:
                reasons.append(f"{type(error).__name__} {str(error)[:60]}")
    raise ValueError(f"other inputs ({'; '.join(reasons[-3:])})")


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


def report(path: str) -> str:
    """The table of docs/heads.md, of the newest record of each type and variant in a file that `main` wrote."""
    with open(path) as file:
        records = {(record["type"], record["variant"]): record for record in map(json.loads, file)}
    seen: dict[tuple[str, str], list] = {}  # (type, class) -> [layout, verdict, why]; the worst verdict of all modules
    order = ("not run", "whole", "right", "wrong")
    for (kind, _), record in sorted(records.items()):
        for name, layout, _, verdict, why in record.get("modules", {}).values():
            before = seen.get((kind, name), ["", "not run", ""])
            if order.index(verdict) >= order.index(before[1]):
                seen[kind, name] = [layout or before[0], verdict, why]
    rows: dict[tuple[str, str], dict[str, None]] = {}
    for (kind, name), (layout, verdict, why) in sorted(seen.items()):
        what = {"right": f"`{layout}`", "whole": f"whole: {why}", "wrong": f"WRONG: {why}"}.get(verdict, "")
        rows.setdefault((what or f"not run, `{layout}`", verdict), {})[
            kind if verdict == "right" else f"{kind} ({name})"
        ] = None
    built = {kind for (kind, _), record in records.items() if "modules" in record}
    right = {kind for (kind, _), (_, verdict, _) in seen.items() if verdict == "right"}
    missing = sorted({kind for kind, _ in records} - built)
    every = len({kind for kind, _ in records})
    lines = [
        f"transformers {transformers.__version__}: {len(built)} of {every} types build from "
        f"a tiny configuration; in {len(right)} of them heads are divided, and right. `make heads` repeats it.",
        "",
        "| order of query, key and value, or why whole | types |",
        "|---|---|",
    ]
    places = {"right": 0, "wrong": 1, "whole": 2, "not run": 3}
    for (what, _), kinds in sorted(rows.items(), key=lambda row: (places[row[0][1]], -len(row[1]), row[0][0])):
        lines.append(f"| {what} | {', '.join(kinds)} |")
    return "\n".join([*lines, "", f"Not built: {', '.join(missing)}.", ""])


def write_report(path: str, table: str) -> None:
    """Puts the table between its marks in a file."""
    with open(path) as file:
        before, begin, rest = file.read().partition("<!-- heads: begin -->\n")
    _, end, after = rest.partition("<!-- heads: end -->")
    if not begin or not end:
        raise ValueError(f"{path}: expected the marks of the table, got none")
    with open(path, "w") as file:
        file.write(before + begin + table + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="build/architectures.jsonl")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--report", metavar="FILE", help="write the table of what --out has, and check nothing")
    arguments = parser.parse_args()
    if arguments.report:
        write_report(arguments.report, report(arguments.out))
        return
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    todo = [
        (kind, variant) for kind in arguments.types or MODEL_MAPPING_NAMES for variant in arguments.variants.split(",")
    ]
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
