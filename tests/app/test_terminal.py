"""Progress: a bar for somebody who watches, lines for a log."""

import sys

from hsaid_kernels.app import terminal


def steps(total: int) -> None:
    with terminal.progress(total, "training") as advance:
        for number in range(total):
            advance(f"loss={number}")


def test_lines_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS", 0.0)
    steps(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"training: {number} of 3 steps" for number in (1, 2, 3)]
    assert lines[-1].endswith("loss=2") and not any("\r" in line for line in lines)


def test_few_lines_in_a_log(monkeypatch, capsys):
    now = iter(range(1000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))  # a second each time it is asked
    steps(95)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("training: 10 of 95 steps, 10 s, loss=9")
    assert lines[-1].startswith("training: 95 of 95 steps")


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    steps(2)
    said = capsys.readouterr().err
    assert "training: 100%" in said and "loss=1" in said and "\r" in said


def runs() -> None:
    with terminal.run_progress("measuring") as show:
        for done, left in ((5, 20), (6, 19), (7, 23), (30, 0)):
            show(done, left, f"score={done}")


def test_lines_about_runs_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "SECONDS", 0.0)
    now = iter(range(0, 1000, 60))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))  # a minute each time it is asked
    runs()
    assert capsys.readouterr().err.splitlines() == [
        "measuring: 5 runs done, about 20 left; score=5",
        "measuring: 6 runs done, about 19 left, about 38 min; score=6",
        "measuring: 7 runs done, about 23 left, about 34 min; score=7",
        "measuring: 30 runs done, about 0 left; score=30",
    ]


def test_a_bar_of_runs_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    runs()
    said = capsys.readouterr().err
    assert "5 of about 25 runs" in said and "30 of about 30 runs" in said and "score=30" in said and "\r" in said


def test_durations():
    assert [terminal.duration(s) for s in (0.4, 59, 61, 3599, 3600, 9000)] == [
        *("0 s", "59 s", "1 min", "1 h 0 min", "1 h 0 min", "2 h 30 min"),
    ]
