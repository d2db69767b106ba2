"""Studies in Optuna's storages: who works on what, and what counts."""

import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import measuring
import optuna
import pytest

from hsaid_kernels.app.measure import study as studies
from hsaid_kernels.app.measure.runs import Run, Scores
from hsaid_kernels.app.measure.storage import StorageError, shown
from hsaid_kernels.app.measure.study import SettingsError, Study

RUN = Run("did", 100, 0.1, 0)
PROGRAM = Path(measuring.__file__)


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
    assert measuring.trials(storage)["COMPLETE"] == 1


def test_a_failed_run_is_free_again(storage):
    study = Study(storage, "measure", {})
    study.claim(RUN).fail("some error")
    assert study.read() == ({}, set())
    assert study.claim(RUN).finish(Scores(0.5, 0.5), 1.0, {})
    assert measuring.trials(storage) == {"FAIL": 1, "COMPLETE": 1}


def test_a_run_that_diverged_is_finished_without_scores(storage):
    study = Study(storage, "measure", {})
    assert study.claim(RUN).finish(Scores(float("nan"), 0.5), 1.0, {})
    assert study.read()[0][RUN].scores is None
    assert study.claim(RUN) is None and measuring.trials(storage)["PRUNED"] == 1


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
    assert (measuring.trials(storage)["COMPLETE"], measuring.trials(storage)["RUNNING"]) == (1, 0)


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

    def beats() -> int:
        return study._trials()[0].user_attrs.get("heartbeat", 0)

    with claim.beating():
        for _ in range(600):
            if beats() >= 2:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("no heartbeat for a minute")
    last = beats()
    time.sleep(1.0)
    assert beats() == last


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
    assert measuring.trials(storage) == {"COMPLETE": 1, "FAIL": 1}


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
