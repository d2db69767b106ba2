"""Measuring the intrinsic dimension of a task (docs/measuring.md)."""

from hsaid_kernels.app.certificate import certified
from hsaid_kernels.app.measure.estimate import Estimate, crossing, estimate
from hsaid_kernels.app.measure.measure import measure
from hsaid_kernels.app.measure.report import Measurement
from hsaid_kernels.app.measure.runs import Diverged, Run, Scores

__all__ = ["Diverged", "Estimate", "Measurement", "Run", "Scores", "certified", "crossing", "estimate", "measure"]
