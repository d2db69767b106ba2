"""Studies in Optuna's storages: who works on what, and what counts."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import measuring
import optuna
import pytest

from hsaid_kernels.app.measure import study as studies
from hsaid_kernels.app.measure.runs import Run, Scores
from hsaid_kernels.app.measure.storage import StorageError, shown
from hsaid_kernels.app.measure.study import SettingsError, Study
from hsaid_kernels.measure import measure

RUN = Run("did", 100, 0.1, 0)
PROGRAM = Path(measuring.__file__)


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.log"], ids=["sqlite", "journal"])
def storage(request, tmp_path):
    return request.param.format(tmp_path)


def trials(storage):
    """Optuna's own view of the study: {state: how many trials}."""
    if storage.startswith("journal:"):
        backend = optuna.storages.journal.JournalFileBackend(storage.removeprefix("journal:"))
        storage = optuna.storages.JournalStorage(backend)
    return Counter(trial.state.name for trial in optuna.load_study(study_name="measure", storage=storage).trials)


def test_a_run_is_claimed_once_and_counts_once(storage):
    first, second = Study(storage, "measure", {"steps": 3}), Study(storage, "measure", {"steps": 3})
    claim = first.claim(RUN)
    assert claim is not None and second.claim(RUN) is None
    assert second.read() == ({}, {RUN})
    assert claim.finish(Scores(0.5, 0.25, 7), 1.5, {"machine": "here"})
    for study in (first, second, Study(storage, "measure", None)):
        outcomes, running = study.read()
        assert not running and list(outcomes) == [RUN]
        assert outcomes[RUN].scores == Scores(0.5, 0.25, 7) and outcomes[RUN].seconds == 1.5
        assert study.claim(RUN) is None
    assert trials(storage)["COMPLETE"] == 1


def test_a_failed_run_is_free_again(storage):
    study = Study(storage, "measure", {})
    study.claim(RUN).fail("some error")
    assert study.read() == ({}, set())
    assert study.claim(RUN).finish(Scores(0.5, 0.5), 1.0, {})
    assert trials(storage) == {"FAIL": 1, "COMPLETE": 1}


def test_a_run_that_diverged_is_finished_without_scores(storage):
    study = Study(storage, "measure", {})
    assert study.claim(RUN).finish(Scores(float("nan"), 0.5), 1.0, {})
    assert study.read()[0][RUN].scores is None
    assert study.claim(RUN) is None and trials(storage)["PRUNED"] == 1


def claim_and_wait(storage, ready):
    claim = Study(storage, "measure", None).claim(RUN)
    with claim.beating():
        ready.set()
        time.sleep(60)


def test_the_run_of_a_killed_worker_is_free_at_once(storage):
    study = Study(storage, "measure", {})
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=claim_and_wait, args=(storage, ready))
    worker.start()
    assert ready.wait(60) and study.read() == ({}, {RUN}) and study.claim(RUN) is None
    worker.kill()
    worker.join()
    assert study.read() == ({}, set())
    assert study.claim(RUN).finish(Scores(0.5, 0.5), 1.0, {})


@pytest.fixture
def clock(monkeypatch):
    """The clock of `study`: [seconds]."""
    now = [1000.0]
    monkeypatch.setattr(studies, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def claim_elsewhere(storage, monkeypatch):
    study = Study(storage, "measure", {})
    with monkeypatch.context() as patch:
        patch.setattr(studies, "_machine", lambda: "another")
        return study, study.claim(RUN)


def test_a_worker_that_is_not_heard_on_another_machine_is_dead(storage, monkeypatch, clock):
    mine = Study(storage, "measure", {})
    other, claim = claim_elsewhere(storage, monkeypatch)
    for second in range(200):  # its heartbeat goes on
        clock[0] += 1
        assert mine.read() == ({}, {RUN})
        if second % studies.BEAT == 0:
            other._storage.set_trial_user_attr(claim._id, "heartbeat", second + 1)
    for _ in range(int(studies.STALE) - 20):  # it stands still
        clock[0] += 1
        assert mine.read() == ({}, {RUN}) and mine.claim(RUN) is None
    for _ in range(20):
        clock[0] += 1
        mine.read()
    assert mine.read() == ({}, set())
    assert mine.claim(RUN).finish(Scores(0.5, 0.5), 1.0, {})
    # It was only slow: its result comes too late and does not count.
    assert not claim.finish(Scores(0.9, 0.9), 9.0, {})
    assert mine.read()[0][RUN].scores == Scores(0.5, 0.5)
    assert (trials(storage)["COMPLETE"], trials(storage)["RUNNING"]) == (1, 0)


def test_a_long_silence_of_the_reader_is_no_death_of_the_worker(storage, monkeypatch, clock):
    mine = Study(storage, "measure", {})
    claim_elsewhere(storage, monkeypatch)
    for _ in range(3):  # the reader looks so seldom that it cannot tell
        assert mine.read() == ({}, {RUN})
        clock[0] += 2 * studies.STALE


def test_the_heartbeat_goes_on_while_a_run_lasts(storage, monkeypatch):
    monkeypatch.setattr(studies, "BEAT", 0.2)
    study = Study(storage, "measure", {})
    claim = study.claim(RUN)
    with claim.beating():
        time.sleep(2.2)
    beats = study._trials()[0].user_attrs["heartbeat"]
    assert beats >= 2
    time.sleep(1.0)
    assert study._trials()[0].user_attrs["heartbeat"] == beats


def test_other_settings_are_refused_with_the_difference(storage):
    Study(storage, "measure", {"steps": 100, "data": "names", "layers": [1, 2]})
    Study(storage, "measure", {"data": "names", "steps": 100, "layers": (1, 2)})
    with pytest.raises(SettingsError) as error:
        Study(storage, "measure", {"steps": 300, "data": "names", "layers": [1, 2]})
    assert "steps was 100 and is now 300. Choose another name" in str(error.value) and "data" not in str(error.value)
    Study(storage, "another", {"steps": 300})


def test_a_study_that_is_not_there(storage, tmp_path):
    with pytest.raises(
        StorageError, match="storage: expected a database or file that can be opened, got .*no such file"
    ):
        Study(storage, "measure", None)
    assert not list(tmp_path.iterdir())  # nothing was made
    Study(storage, "measure", {})
    with pytest.raises(ValueError, match="study: expected one in .*, got 'another'"):
        Study(storage, "another", None)


def test_a_study_that_is_not_ours(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="theirs", storage=storage)
    with pytest.raises(ValueError, match="study: expected one that `measure` made, got 'theirs'"):
        Study(storage, "theirs", None)


def test_trials_that_are_not_ours_are_left_alone(storage):
    study = Study(storage, "measure", {})
    study._storage.create_new_trial(study._id)
    assert study.read() == ({}, set()) and study.claim(RUN) is not None


@pytest.mark.parametrize(
    "storage, message",
    [
        ("postgresql://me:secret@127.0.0.1:1/none", "refused|psycopg"),
        ("sqlite:////proc/nothing/study.db", "nothing"),
        ("journal:/proc/nothing/study.log", "nothing"),
        ("nonsense", "URL"),
        ("nosuchbase://here/db", "nosuchbase"),
        ("postgresql://host:port/db", "port"),
        ("my db://x", "URL"),
    ],
)
def test_a_storage_that_does_not_answer(storage, message):
    with pytest.raises(StorageError) as error:
        Study(storage, "measure", {})
    text = str(error.value)
    assert text.startswith("storage: expected a database or file that can be opened") and "secret" not in text
    assert re.search(message, text) and "\n" not in text


@pytest.mark.parametrize("text", ["my thesis\n", "my thesis\nin two lines\n", "{}\n"])
def test_a_file_that_is_no_journal(tmp_path, text):
    file = tmp_path / "study.log"
    file.write_text(text)
    with pytest.raises(StorageError, match="not a journal of Optuna"):
        Study(f"journal:{file}", "measure", {})
    assert file.read_text() == text


def test_a_journal_survives_a_write_that_was_cut_off(tmp_path):
    storage, file = f"journal:{tmp_path}/study.log", tmp_path / "study.log"
    study = Study(storage, "measure", {"steps": 1})
    assert study.claim(RUN).finish(Scores(0.5, 0.5), 1.0, {})
    for number, cut in enumerate((b'{"op_code":4,"wor', b"x"), 1):
        with file.open("ab") as journal:
            journal.write(cut)
        again = Study(storage, "measure", {"steps": 1})
        assert list(again.read()[0]) == [RUN]
        assert again.claim(Run("did", 300, 0.1, number)) is not None
        assert all(isinstance(json.loads(line), dict) for line in file.read_bytes().splitlines())
        assert len(Study(storage, "measure", None).read()[1]) == number


def test_a_journal_by_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Study("journal:sub/study.log", "measure", {}).claim(RUN)
    assert os.listdir("sub") == ["study.log"]  # the lock is gone
    assert Study(f"journal:{tmp_path}/sub/study.log", "measure", None).read() == ({}, {RUN})


def test_a_study_whose_maker_was_killed_in_between(storage):
    """Between making it and writing its settings."""
    first = Study(storage, "other", {})
    first._storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], "measure")
    with pytest.raises(ValueError, match="study: expected one that `measure` made"):
        Study(storage, "measure", None)
    assert Study(storage, "measure", {"steps": 1}).settings == {"steps": 1}
    with pytest.raises(TypeError, match="settings: expected values that JSON has"):
        Study(storage, "measure", {"data": Path("x")})


def test_the_answer_of_the_storage_is_lost(storage, monkeypatch):
    """The trial was made, but nobody was told so: it is made again, and one of the two counts."""
    study = Study(storage, "measure", {})
    create = study._storage.create_new_trial
    calls = iter([True, False])

    def lost(*args):
        trial = create(*args)
        if next(calls, False):
            raise optuna.exceptions.StorageInternalError("connection lost")
        return trial

    monkeypatch.setattr(study._storage, "create_new_trial", lost)
    claim = study.claim(RUN)
    assert claim.finish(Scores(0.5, 0.5), 1.0, {})
    assert trials(storage) == {"COMPLETE": 1, "FAIL": 1}


def test_a_file_that_is_no_database(tmp_path):
    file = tmp_path / "study.db"
    file.write_text("my thesis\n" * 1000)
    with pytest.raises(StorageError, match="not a database"):
        Study(f"sqlite:///{file}", "measure", {})
    assert file.read_text() == "my thesis\n" * 1000


def test_passwords_are_not_shown():
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert shown("journal:/here") == "journal:/here"
    assert "secret" not in shown("postgresql://me:secret@host:port/db")


def run(out, seconds, workers, storage=""):
    return subprocess.Popen(
        [sys.executable, PROGRAM, out, str(seconds), str(workers), storage],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def table_of(process):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return [row[:-2] if len(row) > 4 else row for row in rows]  # the second table without the seconds of a run


def started(out):
    return [line.split(" ", 1)[1] for line in (out / "started").read_text().splitlines()]


def wait_until(condition, process):
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing happened for a minute")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table of a study that nothing disturbed, and its runs."""
    out = tmp_path_factory.mktemp("undisturbed")
    return table_of(run(out, 0, 1)), sorted(started(out))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_resumed(tmp_path, undisturbed, workers):
    table, runs = undisturbed
    assert len(runs) == len(set(runs)) > 30
    process = run(tmp_path, 0.2, workers)
    wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 10, process)
    process.kill()  # SIGKILL: nothing is tidied up
    process.communicate()
    if workers > 1:  # its workers end by themselves
        pids = {int(line.split()[0]) for line in (tmp_path / "started").read_text().splitlines()}
        for _ in range(100):
            if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the workers go on")
    before = len(started(tmp_path))
    assert before < len(runs)
    assert table_of(run(tmp_path, 0, workers)) == table
    again = Counter(started(tmp_path))
    assert sorted(again) == runs  # nothing is lost
    assert sum(again.values()) - len(runs) <= workers  # only what was interrupted is done again
    assert trials(f"sqlite:///{tmp_path}/study.db")["COMPLETE"] == len(runs)


def test_a_killed_worker_does_not_end_the_others(tmp_path, undisturbed):
    table, runs = undisturbed
    process = run(tmp_path, 0.2, 2)
    wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 6, process)
    os.kill(int((tmp_path / "started").read_text().split()[0]), signal.SIGKILL)
    assert table_of(process) == table
    assert sorted(set(started(tmp_path))) == runs


def test_two_commands_share_a_study(tmp_path, undisturbed, storage):
    table, runs = undisturbed
    processes = [run(tmp_path, 0.05, 1, storage) for _ in range(2)]
    assert [table_of(process) for process in processes] == [table, table]
    assert sorted(started(tmp_path)) == runs  # each run once
    assert len({line.split()[0] for line in (tmp_path / "started").read_text().splitlines()}) == 2
    assert trials(storage)["COMPLETE"] == len(runs)


def test_an_error_in_a_worker_is_raised_here(tmp_path):
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            measure(measuring.MODEL, broken, out=tmp_path, workers=workers, methods=("did",), dims=(100,))
    assert trials(f"sqlite:///{tmp_path}/study.db")["COMPLETE"] == 0
    table = measure(measuring.MODEL, measuring.score, out=tmp_path, methods=("did",), dims=(100,), seeds=1).table()
    assert "DID" in table  # the study is as good as new


def broken(run):
    return 1 / 0


def test_what_cannot_be_sent_to_workers(tmp_path):
    with pytest.raises(ValueError, match="workers: expected 1, or a training function at the top level of a module"):
        measure(measuring.MODEL, lambda run: Scores(1, 1), out=tmp_path, workers=2)


def processes(run):
    """A training function with processes of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(measuring.score, [run])[0]


def test_a_training_function_may_have_processes(tmp_path):
    options = {"methods": ("did",), "dims": (100,), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    assert measure(measuring.MODEL, processes, out=tmp_path, workers=2, **options).runs == 6


def test_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import measuring\nfrom hsaid_kernels.measure import measure\n"
        f"measure(measuring.MODEL, measuring.score, out={str(tmp_path)!r}, workers=2, methods=('did',))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "call measure() under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


def test_another_name_has_a_directory_of_its_own(tmp_path):
    options = {"methods": ("did",), "dims": (100,), "seeds": 1, "refine": 0, "rates": measuring.RATES, "out": tmp_path}
    measure(measuring.MODEL, measuring.score, **options)
    before = (tmp_path / "results.json").read_bytes()
    measure(measuring.MODEL, measuring.score, name="two", settings={"steps": 2}, **options)
    assert (tmp_path / "results.json").read_bytes() == before
    assert json.loads((tmp_path / "two" / "results.json").read_text())["settings"]["steps"] == 2


def reaching(top, run):
    return Scores(top, top) if run.dim is None else Scores(top / 2, top / 2)


@pytest.mark.parametrize(
    "top, chance, message",
    [
        (0.5, 0.5, "baseline: expected full fine-tuning to beat 0.500"),
        (0.85, 0.8, "threshold: expected a share of the baseline's 0.850 above the 0.800 that needs no training"),
        (-1.0, -10.0, "baseline: expected a test score above 0"),
        (float("nan"), 0.1, "baseline: expected full fine-tuning to learn, but it diverged"),
    ],
)
def test_a_baseline_of_which_no_share_can_be_told(tmp_path, top, chance, message):
    with pytest.raises(ValueError, match=message):
        measure(measuring.MODEL, partial(reaching, top), chance=chance, out=tmp_path, dims=(500,), methods=("did",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": {"theat": 3.0}}, "rates: expected a rate for some of full, theta, got one for 'theat'"),
        ({"rates": {"theta": 1e9}}, "rates: expected rates from 1e-7 to 1,000"),
        ({"methods": "did"}, "methods: expected a list of partitions, got the string 'did'"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"out": "what?x=1"}, "out: expected a path without [?], or a storage elsewhere"),
    ],
)
def test_arguments_that_cannot_be_right(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        measure(measuring.MODEL, measuring.score, **{"out": "out", **options})


def test_scores_that_are_none():
    with pytest.raises(TypeError, match="test: expected a number, got None"):
        Scores(1.0, None)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, undisturbed):
    if os.geteuid() != 0:
        pytest.skip("needs to mount a small file system, as root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", small], capture_output=True).returncode:
        pytest.skip("needs to mount a small file system, which is not allowed here")
    try:
        ballast = small / "ballast"
        process = run(tmp_path, 0.2, 1, f"sqlite:///{small}/study.db")
        wait_until(lambda: (tmp_path / "started").exists() and len(started(tmp_path)) >= 6, process)
        file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="space"):
            while True:
                os.write(file, bytes(4096))
        os.close(file)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "full" in text.splitlines()[-1], text
        ballast.unlink()
        assert table_of(run(tmp_path, 0, 1, f"sqlite:///{small}/study.db")) == undisturbed[0]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_methods_with_names_of_their_own(tmp_path):
    options = {"methods": ("did",), "dims": (50, 500), "seeds": 1, "refine": 0, "rates": measuring.RATES}
    labels = {"full": "all weights", "did": "dense matrix"}
    found = measure(measuring.MODEL, measuring.score, out=tmp_path, labels=labels, **options)
    assert "| all weights " in found.table() and "dense matrix |" in found.table() and "DID" not in found.table()
    assert "interval" not in found.table()  # of one seed


def test_results_in_a_file(tmp_path):
    found = measure(measuring.MODEL, measuring.score, out=tmp_path, methods=("did",), dims=(50, 500), seeds=2, refine=0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == found.runs and results["dimensions"]["did"]["answer"] == "found"
    assert results["dimensions"]["did"]["d"] == pytest.approx(found.dimensions["did"].d, abs=0.1)
    assert (tmp_path / "table.md").read_text().strip() == found.table()
    assert (tmp_path / "dimension.png").read_bytes().startswith(b"\x89PNG")
