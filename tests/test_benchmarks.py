"""The benchmarks' own code: peers compute what they say, rows become the right tables, wrong kernels get no speed."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import host_time
import peers
import places
import plots
import pytest
import report
import results
import schedule
import scipy.linalg
import shapes
import sharding
import stages
import tables
import torch
from helpers import ISAS

from hsaid_kernels import available_backends

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


def splitmix64(x: int) -> int:
    """As published, in Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_gpart():
    """Groups by SplitMix64, whose first number of seed 0 is known; an isometry; and its transpose as the gradient."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    first, count, seed, dim = 2**40 + 5, 700, 3, 30
    groups = peers.gpart_groups(first, count, seed, dim)
    assert groups.tolist() == [splitmix64(seed + first + i) % 2**63 % dim for i in range(count)]
    matrix = torch.nn.functional.one_hot(groups, dim).double()
    norms = matrix.sum(0).sqrt()
    matrix = matrix / norms
    assert torch.allclose(matrix.T @ matrix, torch.eye(dim, dtype=torch.float64))
    theta, base = torch.randn(dim, dtype=torch.float64, requires_grad=True), torch.randn(70, 10, dtype=torch.float64)
    weights = peers.GPart.apply(theta, base, norms, first, seed)
    assert torch.allclose(weights, base + (matrix @ theta).view(70, 10))
    grad = torch.randn(70, 10, dtype=torch.float64)
    assert torch.allclose(torch.autograd.grad(weights, theta, grad)[0], matrix.T @ grad.flatten())
    measured = {"what": "gpart", "weights": count, "d": dim, "ms": 900.0, "ours_ms": 30.0, "/ours": 30.0}
    assert "| GPart's formula in torch, groups made anew, d = 30, forward and backward |" in report.terminal([measured])


def row(what: str, ms: float, **columns) -> dict:
    key = dict(model="mBERT", isa="avx2", dtype="float32", diagonal="gaussian", d=1000, width=1024, threads=2)
    spread = {f"{name}{part}": x for name, x in (("ms", ms), ("floor_ms", 50.0), ("/floor", ms / 50)) for part in PARTS}
    return {"what": what, "weights": 1_778_549, "GB/s": 3.0} | spread | key | columns


PARTS = ("", "_20", "_80")


def test_tables():
    rows = [row("forward", 100.0), row("adjoint", 120.0), row("forward", 300.0, d=16384, width=16384)]
    lines = tables.Tables({}, rows).headline().splitlines()
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
    cells = [cell.strip() for cell in tables.Tables({}, rows).by_threads().splitlines()[2].strip("| ").split("|")]
    assert cells[3:] == ["190", "100", "1.90 (1.90 to 1.90)", "1.25"]


def test_computed_rows_say_so():
    rows = [row("forward", 100.0, weights=tables.WEIGHTS_7B // 10), row("adjoint", 120.0)]
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


def beside(dtype: str, n: int, **ratios) -> dict:
    """A row of the transform beside packages; a ratio of None: its result was wrong."""
    row = dict(what="transform beside", where="new", dtype=dtype, n=n, threads=1, ms=6.0, ms_20=6.0, ms_80=6.0)
    row |= {"packages": dict.fromkeys(ratios, "1.0"), "wrong": [name for name, r in ratios.items() if r is None]}
    timed = {name: r for name, r in ratios.items() if r}
    row |= {f"{name}_ms": 6.0 / r for name, r in timed.items()}
    return row | {f"/{name}{part}": r for name, r in timed.items() for part in PARTS}


def test_transforms_of_others(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [beside("float64", 256, fast=2.0), beside("float32", 1024, fast=0.5, wrong=None)]
    text = tables.Tables({}, rows).transform_beside()
    assert text in report.terminal(rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["into", "values in", "n", "ours, ms", "/ fast 1.0", "/ wrong 1.0"]
    assert lines[2] == ["new", "float32", "1,024", "6.00", "0.50 (0.50 to 0.50)", "wrong, not timed"]
    assert lines[3] == ["new", "float64", "256", "6.00", "2.00 (2.00 to 2.00)", ""]  # the other does not take it
    assert plots.draw(results.Run({}, rows), tmp_path) == {"transform_new"}


@pytest.mark.parametrize("name", peers.PACKAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [32, 4096])
def test_installed_transforms(name, dtype, n):
    """In the order of scipy's matrix, new and in place, within what is taken for right."""
    if (transform := peers.installed_transforms(dtype).get(name)) is None:
        pytest.skip(f"{name} is not installed, or takes no rows in {dtype}")
    x = torch.randn(3, n, dtype=dtype)
    kept, y = x.clone(), x.clone()
    matrix = torch.from_numpy(scipy.linalg.hadamard(n)).double() / (math.sqrt(n) if transform.normalized else 1)
    if transform.in_place:
        transform.in_place(y)
    for result in (transform.new(x), y) if transform.in_place else (transform.new(x),):
        assert torch.allclose(result.double(), x.double() @ matrix, rtol=0, atol=1e-3)
        assert peers.error_of(result, x, transform.normalized) <= 1
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_transform_is_found(dtype):
    """Of another order, of one sign, of a value in the wrong place, not a number, rounded more coarsely, or cut."""
    x = torch.randn(4, 256, dtype=dtype)
    exact = (x.double() @ torch.from_numpy(scipy.linalg.hadamard(256)).double()).to(dtype)
    assert peers.error_of(exact, x) <= 1 and peers.error_of(exact / 16, x, normalized=True) <= 1
    nan, sign = exact.clone(), exact.clone()
    nan[3, 7], sign[0, 255] = math.nan, -sign[0, 255]
    coarse = exact.to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    for wrong in (exact.flip(1), exact / 16, nan, sign, coarse.to(dtype), coarse, exact[:3], torch.zeros_like(exact)):
        assert peers.error_of(wrong, x) > 1


def test_sharding_is_said_to_be_computed():
    said = sharding.tables((1, 3, 512)).split("\n\n")
    assert all(text.startswith("Computed: ") for text in said[::2])
    assert all(text.startswith("| ") for text in said[1::2])
    for weights in ("6,738,415,616", "70,553,706,496", "405,853,388,800"):  # as published
        assert f" {weights} |" in said[1]
    step = sharding.Step(sharding.MODELS["7B"])
    assert sum(step.blocks) == step.weights
    assert sum(32000 * 4096 == block for block in step.blocks) == 2


def test_sharding_sends_what_is_computed():
    """`check` raises where it does not. So small a model says nothing of memory."""
    pytest.importorskip("transformers")
    said = sharding.check(model=sharding.Model(256, 3, 4, 2, 512, 4096, tokens=16, nbytes=4), within=math.inf)
    assert "Sent: 0.66" in said


def test_remarks():
    assert results.remark("d = 9, a / b", 1.999, 2) == {} and results.remark("d = 9, a / b", 0, 2) == {}
    said = {"remark": "d = 9, a / b: 2.85, expected below 2"}
    assert results.remark("d = 9, a / b", 2.852, 2) == said
    assert results.remark("d = 9, a / b", math.nan, 2)
    study = {"what": "study", "runs": 40} | {f"ms{part}": 250.0 for part in PARTS}
    assert "Remark" not in tables.Tables({}, [study]).study()
    lines = tables.Tables({}, [study | said]).study().splitlines()
    assert lines[2:] == [
        "|   40 |      250 |             250 |  250 |",
        "",
        "- Remark: d = 9, a / b: 2.85, expected below 2",
    ]


def test_readme_between_marks():
    assert report.replace_between(f"a {report.BEGIN} old {report.END} b", "new\n") == (
        f"a {report.BEGIN}\nnew\n{report.END} b"
    )
    with pytest.raises(SystemExit, match="README.md: expected"):
        report.replace_between("no marks", "new")


def run_benchmarks(folder: Path, planted: str, *arguments: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Runs `pytest benchmarks/...` with a plugin; where the rows should be in the end."""
    (folder / "planted.py").write_text(planted)
    path = folder / "rows.json"
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "planted", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, f"--results={path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"PYTHONPATH": str(folder)},
    )
    return run, path


# As if these were all the benchmarks.
ONLY = """
def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if item.name in {names!r}]
"""
WRONG = """
from hsaid_kernels.fastfood import ops
exact = ops.fastfood_{part}

def wrong(*args):
    result = exact(*args)
    if args[-1] == "cpu" and args[0].rademacher:
        (result if "{part}" == "forward" else result[1])[1:2].mul_(1 + 2e-7)
    return result

ops.fastfood_{part} = wrong
"""
SLOW = """
import time
from hsaid_kernels.fastfood import ops
quick = ops.fastfood_forward

def slow(plan, theta, factors, base, *others):
    if "w" in plan.names and base[0].data_ptr() % 4096 == 4096 - 64:
        begin = time.thread_time()
        while time.thread_time() - begin < 0.05:
            pass
    return quick(plan, theta, factors, base, *others)

ops.fastfood_forward = slow
"""
BROKEN = """
def pytest_runtest_call(item):
    if item.name == "test_hadamard_transform[float32-16384]":
        raise RuntimeError("it broke")
"""
needs_cpu = pytest.mark.skipif(not ISAS, reason="the CPU library was not built")


@needs_cpu
@pytest.mark.parametrize("part", ["forward", "adjoint"])
def test_no_speed_of_wrong_kernels(tmp_path, part):
    """One value in the last place turns the gate red: nothing is reported, nothing written, slow or not."""
    names = [f"test_places[{places.MEASURED[0]}-forward-rademacher-2048]", "test_hadamard_transform[float32-1024]"]
    planted = WRONG.format(part=part) + SLOW + ONLY.format(names=names)
    run, path = run_benchmarks(tmp_path, planted, "benchmarks")
    assert run.returncode == 1 and not path.exists()
    assert "gate: the kernels and the reference differ" in run.stdout
    assert "measured" not in run.stdout and "ms" not in run.stdout and "Remark" not in run.stdout


@needs_cpu
def test_a_slow_place_is_a_remark(tmp_path):
    """Printed and written like any other speed, and in the tables that are made of the rows again."""
    names = [f"test_places[{places.MEASURED[0]}-forward-rademacher-2048]", "test_hadamard_transform[float32-1024]"]
    planted = SLOW + ONLY.format(names=names)
    run, path = run_benchmarks(tmp_path, planted, "benchmarks")
    assert run.returncode == 0, run.stdout
    assert "Where W0 lies" in run.stdout and "The transform alone" in run.stdout
    (remark,) = (line for line in run.stdout.splitlines() if "Remark" in line)
    said = f"- Remark: {places.MEASURED[0]}, forward, rademacher, n = 2,048, place 4032 / elsewhere: "
    assert remark.startswith(said) and remark.endswith(", expected below 1.2")
    _, rows = results.load(path)
    assert [row["what"] for row in rows if "remark" in row] == ["place"]
    assert remark in report.terminal(rows)


@needs_cpu
def test_a_part_of_the_benchmarks_is_printed_and_not_written(tmp_path):
    run, path = run_benchmarks(tmp_path, "", "benchmarks/test_hadamard_transform.py", "-k", "1024")
    assert run.returncode == 0, run.stdout
    assert "The transform alone" in run.stdout and not path.exists()


@needs_cpu
def test_a_benchmark_that_breaks_keeps_no_other_back(tmp_path):
    names = [f"test_hadamard_transform[float32-{n}]" for n in (16384, 1024)]
    run, path = run_benchmarks(tmp_path, BROKEN + ONLY.format(names=names), "benchmarks")
    assert run.returncode == 1 and "it broke" in run.stdout
    shown = run.stdout.split("The transform alone")[1]
    assert "| 1,024 |" in shown and "16,384" not in shown
    assert not path.exists()  # a row is missing


# --- `make gpu`, without a GPU


def run_stages(out: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | variables | {"OUT": str(out)}
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "stages.py"], env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(available_backends()["cuda"] is True, reason="the CUDA backend is here")
def test_stages_end_with_the_reason_where_there_is_no_cuda_backend(tmp_path):
    run = run_stages(tmp_path, STAGES="1 2 3", HSAID_BUILT="1")
    assert run.returncode == 1
    assert f"cuda: {available_backends()['cuda']}" in run.stdout
    assert "nothing to test or measure" in run.stdout and "[2]" not in run.stdout
    assert "cuda:" in (tmp_path / "1.log").read_text()


def test_stages_that_are_not_there(tmp_path):
    run = run_stages(tmp_path, STAGES="1 7")
    assert run.returncode == 1 and "STAGES: expected some of 1 2 3 4 5, got '7'" in run.stderr


def test_a_stage_goes_on_after_a_failure_and_ends_in_time(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    steps = [
        stages.Step("fails", 60, [*python, "print('why'); raise SystemExit(3)"]),
        stages.Step("hangs", 1, [*python, "import time; time.sleep(60)"]),
        stages.Step("is not there", 60, ["no-such-command"]),
        stages.Step("works", 60, [*python, "print('rows')"]),
    ]
    monkeypatch.setattr(stages, "stages", lambda out: {"2": steps})
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("STAGES", raising=False)
    assert stages.main() == 1
    said = capsys.readouterr().out
    assert "fails: failed with 3" in said and "why" in said
    assert "hangs: not done after 1 s" in said and "no-such-command does not start" in said
    assert "works: ok" in said and "Failed: 2 fails, 2 hangs, 2 is not there." in said
    assert "rows" in (tmp_path / "2.log").read_text()


def test_a_row_that_fails_does_not_end_the_rest(tmp_path, monkeypatch, capsys):
    def row(number):
        if number == 2:
            raise RuntimeError("no such row")
        return {"what": "row", "number": number}

    for name, value in {
        "measurements": lambda backend: [(row, (i,)) for i in (1, 2, 3)],
        "gate": lambda backends: None,
        "machine": lambda: {"gpu": "A card"},
        "card": lambda: {"watts": 70.0},
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.ops, "choose_backend", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no row from row\(2,\)"):
        gpu.main()
    about, rows = results.load(tmp_path / "a-card.json")
    assert about == {"gpu": "A card"} and [r["number"] for r in rows] == [1, 3] and rows[0]["watts"] == 70.0
    assert "no such row" in capsys.readouterr().err


def test_time_in_which_a_kernel_runs():
    """One that waits for the one in front of it counts once."""
    times = [(0, 100), (50, 120), (300, 400), (310, 320)]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b)) for a, b in times]
    assert gpu.busy(events) == pytest.approx(0.22)
    assert gpu.busy([]) == 0


def test_places_are_taken_as_they_become_free():
    assert schedule.groups_of([5 * 2**14 + 1, 3, 4 * 2**14], 2) == [2, 2, 2, 2, 2, 1]
    assert schedule.time_until_done([2, 2, 1], 2) == pytest.approx(3 + 2 * schedule.BESIDE)


def test_a_slow_place_is_found():
    """Among 64 that take as long as each other, and its row in the table with the remark below."""

    def working(seconds: float) -> places.Call:
        def work() -> None:
            begin = time.thread_time()
            while time.thread_time() - begin < seconds:
                pass

        return work

    calls = {place: working(3e-4 if place == 4032 else 1e-4) for place in places.ALL}
    columns = places.slowest(calls, 3)
    assert columns["place"] == 4032 and 2 < columns["/elsewhere"] < 4
    assert columns["/elsewhere_20"] <= columns["/elsewhere"] <= columns["/elsewhere_80"]
    rows = [dict(what="place", isa="avx2", part="forward", diagonal="gaussian", width=w) | columns for w in (256, 512)]
    lines = tables.Tables({}, [rows[1], rows[0] | {"remark": "too slow"}]).places().splitlines()
    assert lines[0].split() == "| instruction set | | diagonal | n = 256 | n = 512 |".split()
    assert lines[2].split()[1:6:2] == ["AVX2", "forward", "gaussian"] and len(lines) == 5
    assert lines[4] == "- Remark: too slow"


def test_places_are_where_they_say():
    room = torch.zeros(places.WEIGHTS + 2 * places.PAGE)
    for part, place, moved in (("forward", 192, 0), ("adjoint", 4032, 0), ("forward, W moved", 256, 64)):
        plan, tensors = places.case(part, "rademacher", 4096, room, place)
        offset = plan.numel - places.WEIGHTS
        assert offset == moved and tensors[-1].numel() == places.WEIGHTS
        assert tensors[0].data_ptr() % places.PAGE == (places.PAGE // 2 if moved else place)


def test_host_time_of_the_backends_that_can_be_measured_here():
    script = Path(gpu.__file__).with_name("host_time.py")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True, env=variables).stdout
    times = {line.rsplit(maxsplit=2)[0]: float(line.split()[-2]) for line in printed.splitlines()[1:]}
    assert printed.startswith("201 tensors") and min(times.values()) > 0
    assert {"asking for addresses", "an operator in Python that does nothing"} <= times.keys()
    for backend in {name.split(",")[0] for name in times if name.endswith(("forward", "adjoint"))}:
        assert {f"{backend}, forward", f"{backend}, adjoint", f"{backend}, adjoint of nothing"} <= times.keys()


def test_rounds_of_host_time_take_turns():
    order: list[str] = []
    times = host_time.microseconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, calls=2, rounds=3)
    assert "".join(order) == "aabb" * 4 and times.keys() == {"a", "b"}
