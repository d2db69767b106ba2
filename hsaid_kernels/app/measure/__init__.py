"""Measuring the intrinsic dimension of a task (docs/measuring.md): estimate, schedule, study, workers, report."""
