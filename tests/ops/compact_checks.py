"""What keep="compact" may cost: an error of S and S° of 2^-16 of their largest size, on top of the usual ones."""

from __future__ import annotations

import torch
from accuracy_cases import errors, rounding_unit
from kernel_checks import Subject, margins
from sweep_cases import Batch, Outcome, outcome

from cliperase_fast.ops import eager


def check_compact(subject: Subject, batch: Batch, dtype: torch.dtype = torch.bfloat16) -> Outcome:
    """Compare `batch` in `dtype` with float64, keeping 16 bits of each similarity; return what was found."""
    batch = batch.to(dtype).to(torch.float64)
    truth = outcome(eager.sweep, batch)
    found = outcome(subject.sweep, batch.to(dtype), keep="compact")
    allowed, kept = margins(batch, truth, dtype), rounding_unit(batch, truth, 2.0**-16)
    for key, error in errors(found, truth).items():
        assert error <= allowed[key] + (0 if key == "loss" else kept[key]), (key, error, allowed[key], kept[key])
    return found
