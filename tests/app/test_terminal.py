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
