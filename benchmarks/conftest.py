"""Collects the rows that the benchmarks measure and prints them as one table at the end."""

import pytest

ROWS: list[dict[str, object]] = []


@pytest.fixture
def report():
    """Call with the columns of a row."""
    return lambda **row: ROWS.append(row)


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    cells = [[str(value) for value in row.values()] for row in ROWS]
    header = list(ROWS[0])
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    terminalreporter.section("mBERT, 201 tensors, 177,854,978 weights; times are medians in ms, ratios are of one run")
    for line in [header, *cells]:
        terminalreporter.write_line("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
