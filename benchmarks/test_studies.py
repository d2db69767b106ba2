"""What a study of the intrinsic dimension takes beside its runs: runs that train nothing, in one process, in SQLite."""

import time

import pytest
import results

ROUNDS = 3
ASKED_MS = 200  # for each run


def test_study(record, tmp_path):
    pytest.importorskip("optuna")
    import measuring

    from hsaid_kernels.measure import measure

    def study(name: str, **options) -> int:
        options |= {"methods": ("did",), "rates": measuring.RATES}
        return measure(measuring.MODEL, measuring.score, out=tmp_path / name, **options).runs

    study("warm-up", dims=(50,), seeds=1, refine=0)  # imports what a study needs
    taken = []
    for number in range(ROUNDS):
        start = time.perf_counter()
        runs = study(str(number))
        taken.append(1e3 * (time.perf_counter() - start) / runs)
    columns = results.spread("ms", taken)
    columns |= results.remark("a study beside its runs, ms a run", columns["ms"], ASKED_MS)
    record(what="study", runs=runs, rounds=ROUNDS, **columns)
