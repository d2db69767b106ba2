"""The benchmarks' own code: peers compute what they say, rows become the right tables, wrong kernels get no speed."""

import math
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import report
import results
import scipy.linalg
import shapes
import torch
from helpers import ISAS

ROOT = Path(__file__).parent.parent


def test_shapes():
    transformers = pytest.importorskip("transformers")
    minilm = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    xlm_r = dict(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)
    llama = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    llama |= dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
    with torch.device("meta"):
        mbert = transformers.BertConfig(vocab_size=119547, num_labels=2)
        models = {
            "mBERT": transformers.BertForSequenceClassification(mbert),
            "MiniLM": transformers.BertModel(transformers.BertConfig(**minilm)),
            "XLM-R base": transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**xlm_r)),
            "Llama 1B": transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        }
    for name, model in models.items():
        expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert shapes.tensors(name) == expected
    assert sum(math.prod(s) for s in shapes.tensors("10^7 weights").values()) == 10**7


@pytest.mark.parametrize("transform", peers.TRANSFORMS)
@pytest.mark.parametrize("numel, dim", [(50, 7), (64, 100), (1, 3)])
def test_published_algorithm(transform, numel, dim):
    """The matrix H G Pi H B, cut and scaled, and its transpose as the gradient; theta cut where the tensor is short."""
    published = peers.Published(numel, dim, peers.TRANSFORMS[transform])
    size, used = published.size, min(dim, published.size)
    assert size == 1 << (numel - 1).bit_length()
    h = torch.from_numpy(scipy.linalg.hadamard(size)).double()
    mixed = (h * published.signs.double())[published.permutation]
    g = published.g.double()
    matrix = ((h * g) @ mixed)[:numel, :used] / math.sqrt(size * float(g.square().sum())) / math.sqrt(numel / size)
    base, theta = torch.randn(numel), torch.randn(dim, requires_grad=True)
    factor = torch.tensor(1.5, requires_grad=True)
    weights = published.forward(base, theta, factor)
    assert torch.allclose(weights.double(), base + 1.5 * matrix @ theta[:used].double(), atol=1e-4)
    grad = torch.randn(numel)
    dtheta, dfactor = torch.autograd.grad(weights, (theta, factor), grad)
    assert torch.allclose(dtheta[:used].double(), 1.5 * matrix.T @ grad.double(), atol=1e-4)
    assert not dtheta[used:].any()
    assert math.isclose(
        dfactor.item(), (matrix @ theta[:used].detach().double()) @ grad.double(), rel_tol=1e-3, abs_tol=1e-3
    )


def row(what: str, ms: float, **columns) -> dict:
    key = dict(model="mBERT", isa="avx2", dtype="float32", diagonal="gaussian", d=1000, width=1024, threads=2)
    spread = {f"{name}{part}": x for name, x in (("ms", ms), ("floor_ms", 50.0), ("/floor", ms / 50)) for part in PARTS}
    return {"what": what, "weights": 1_778_549, "GB/s": 3.0} | spread | key | columns


PARTS = ("", "_20", "_80")


def test_tables():
    rows = [row("forward", 100.0), row("adjoint", 120.0), row("forward", 300.0, d=16384, width=16384)]
    lines = report.Report({}, rows).headline().splitlines()
    assert len({len(line) for line in lines}) == 1  # columns of one width
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        *("AVX2", "float32", "gaussian", "1,000", "50.0", "100", "3.00", "2.00 (2.00 to 2.00)"),
        *("50.0", "120", "3.00", "2.40 (2.40 to 2.40)"),
    ]
    assert lines[3].strip("| ").endswith("6.00 (6.00 to 6.00)")  # no adjoint: empty cells
    assert "speed-up" not in report.terminal(rows) and "GPU" not in report.terminal(rows)  # no rows, no section
    speedup = {f"/all_threads{part}": 1.9 for part in PARTS}
    rows.append(row("forward", 190.0, threads=1, all_threads_ms=100.0, floor_all_threads_ms=40.0, **speedup))
    cells = [cell.strip() for cell in report.Report({}, rows).by_threads().splitlines()[2].strip("| ").split("|")]
    assert cells[3:] == ["190", "100", "1.90 (1.90 to 1.90)", "1.25"]


def test_computed_rows_say_so():
    rows = [row("forward", 100.0, weights=report.WEIGHTS_7B // 10), row("adjoint", 120.0)]
    text = report.terminal(rows)
    line = next(line for line in text.splitlines() if line.startswith("| float32") and "27.0" in line)
    assert "computed, not measured" in text
    assert [cell.strip() for cell in line.strip("| ").split("|")][3:6] == ["0.50", "1.00", "1.20"]


def test_results_file(tmp_path):
    rows = [row("forward", 100.0), row("adjoint", 120.0)]
    results.save(tmp_path / "new" / "x.json", results.machine(), rows)
    about, loaded = results.load(tmp_path / "new" / "x.json")
    assert loaded == rows
    assert {"cpu", "torch", "python", "commit", "changed_since", "threads"} <= about.keys()
    assert results.file_name("AMD EPYC(TM) 7B13", "quick") == "amd-epyc-tm-7b13-quick.json"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    both = [row(what, 100.0 * scale, d=d, width=w) for what in ("forward", "adjoint") for d, w, scale in SWEEP]
    both += [r | {"diagonal": "rademacher", "ms": r["ms"] / 2} for r in both]
    small = dict(model="10^6 weights", weights=10**6)
    rows = both + [r | small for r in both if r["d"] == 1000]
    rows.append({"what": "step", "method": "x", "trained": 9, "ms": 3.0, "optimiser_ms": 3.0, "peak_MB": 100.0})
    path = tmp_path / "rows.json"
    results.save(path, results.machine(), rows)
    command = [sys.executable, ROOT / "benchmarks" / "report.py"]
    subprocess.run([*command, path, "--out", tmp_path / "out"], check=True, cwd=tmp_path)
    assert {p.name for p in (tmp_path / "out" / "plots").iterdir()} == {
        *("memory.png", "roofline.png", "step.png", "time_against_d.png", "time_against_weights.png")
    }
    assert "computed, not measured" in (tmp_path / "out" / "benchmarks.md").read_text()


SWEEP = ((1000, 1024, 1.0), (16384, 16384, 1.3), (100_000, 16384, 6.0))


def test_readme_between_marks():
    assert report.replace_between(f"a {report.BEGIN} old {report.END} b", "new\n") == (
        f"a {report.BEGIN}\nnew\n{report.END} b"
    )
    with pytest.raises(SystemExit, match="README.md: expected"):
        report.replace_between("no marks", "new")


PLANTED = """
from hsaid_kernels import ops
exact = ops.fastfood_{part}

def wrong(*args):
    result = exact(*args)
    if args[-1] == "cpu" and args[0].rademacher:
        (result if "{part}" == "forward" else result[1])[1:2].mul_(1 + 2e-7)
    return result

ops.fastfood_{part} = wrong
"""


@pytest.mark.skipif(not ISAS, reason="the CPU library was not built")
@pytest.mark.parametrize("part", ["forward", "adjoint", None])
def test_no_speed_of_wrong_kernels(tmp_path, part):
    """One value in the last place turns the gate red: nothing is reported, nothing written."""
    (tmp_path / "planted.py").write_text(PLANTED.format(part=part) if part else "")
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_hadamard_transform.py", "-q", "-p", "planted"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--results={path}", "-k", "1024"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert not path.exists()  # of a part of the benchmarks neither
    if part:
        assert run.returncode == 1
        assert "gate: the kernels and the reference differ" in run.stdout
        assert "measured" not in run.stdout and "ms" not in run.stdout
    else:
        assert run.returncode == 0, run.stdout
        assert "The transform alone" in run.stdout
