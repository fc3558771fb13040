"""Batches in which cancellation bites, and the unit of the error that rounding allows there.

The unit of the allowed error is what one rounding of the similarities can do. Each S_ij = s <I_i, T_j> has an
error of about eps (1 + s), so a gradient s Σ_j dS_ij T_j cannot be better than eps (1 + s) times its mass
s Σ_j |dS_ij| (worst row or column), nor a loss better than eps (1 + s) Σ_ij |dS_ij| plus eps times itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from sweep_cases import Batch, Outcome, outcome, random_batch
from torch import Tensor

from cliperase_fast.ops import eager
from cliperase_fast.ops.native import extension
from cliperase_fast.ops.spec import Sweep

# The instruction sets of the backend "native", and the flag of each in /proc/cpuinfo.
INSTRUCTION_SETS = {
    "portable": "",
    "avx2": " avx2 ",
    "avx512": " avx512f ",
    "avx512_bf16": " avx512_bf16 ",
    "amx": " amx_bf16 ",
    "amx_emulated": "",
}
MULTIPLY_BFLOAT16 = ("avx512_bf16", "amx", "amx_emulated")


UNDERFLOW = 1e-36  # float32 ends near 1e-38; what is smaller comes out as 0


def runs_here(instructions: str) -> bool:
    """Whether this processor has the instruction set."""
    with open("/proc/cpuinfo") as cpuinfo:
        return INSTRUCTION_SETS[instructions].strip() in cpuinfo.read()


def _perturbed(tensor: Tensor, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return F.normalize(tensor + noise * random / tensor.shape[1] ** 0.5, dim=1)


def regime(name: str, scale: float, n: int) -> Batch:
    """float64 batches of float32 numbers, so that the inputs carry no rounding of their own."""
    batch = random_batch(n, width=64, teacher_width=64, scale=scale, teacher_scale=scale)
    if name == "random":
        pass
    elif name == "converged":  # nearly perfect pairs in student and teacher
        text = _perturbed(batch.image, 0.05, 1)
        teacher = _perturbed(batch.image, 0.1, 2), _perturbed(batch.image, 0.1, 3)
        batch = replace(batch, text=text, teacher_image=teacher[0], teacher_text=teacher[1])
    elif name == "anti-aligned":  # every pair points apart
        batch = replace(batch, text=_perturbed(-batch.image, 0.05, 1))
    elif name == "collapsed":  # all rows equal; the teacher is not
        batch = replace(batch, image=batch.image[:1].repeat(n, 1), text=batch.text[:1].repeat(n, 1))
    elif name == "collapsed teacher":
        teacher = batch.teacher_image[:1].repeat(n, 1), batch.teacher_text[:1].repeat(n, 1)
        batch = replace(batch, teacher_image=teacher[0], teacher_text=teacher[1])
    elif name == "half converged":  # some rows perfect, some hopeless, in one batch
        sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()[:, None]
        batch = replace(batch, text=_perturbed(batch.image * sign, 0.05, 1))
    else:
        raise ValueError(name)
    return batch.to(torch.float32).to(torch.float64)


REGIMES = ("random", "converged", "anti-aligned", "collapsed", "collapsed teacher", "half converged")


def off_diagonal_mass(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Row plus column softmax off the diagonal, [N, N], and 1 - P_ii of both, [N]; nothing cancels."""
    lowest = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -torch.inf)
    mass = (lowest - similarity.logsumexp(1, keepdim=True)).exp() + (lowest - similarity.logsumexp(0)).exp()
    return mass, (mass.sum(1) + mass.sum(0)) / 2


def rounding_unit(batch: Batch, truth: Outcome, eps: float) -> dict[str, float]:
    """What a rounding of eps in the similarities may do to each result; see the head of this file."""
    s = batch.scale.item()
    similarity = s * batch.image @ batch.text.T
    mass, rest = off_diagonal_mass(similarity)
    if batch.want_consistency:
        teacher_mass, teacher_rest = off_diagonal_mass(batch.teacher_scale * batch.teacher_image @ batch.teacher_text.T)
        mass, rest = mass + teacher_mass, rest + teacher_rest
    mass = (mass + rest.diag()) / len(mass)
    worst = max(mass.sum(0).max().item(), mass.sum(1).max().item())
    of_scale = (mass * (batch.image @ batch.text.T).abs()).sum().item()
    unit = eps * (1 + s + (batch.teacher_scale.item() if batch.want_consistency else 0))
    loss = unit * mass.sum().item() + eps * (truth.retention + truth.consistency).abs().item()
    return {
        "loss": loss,
        "image": unit * s * worst,
        "text": unit * s * worst,
        "scale": unit * max(of_scale, 1e-300),
    }


def allowed_errors(batch: Batch, truth: Outcome, dtype: torch.dtype) -> dict[str, float]:
    """Of a sweep that computes in float32, for features of `dtype`: on top comes the gradients' rounding to it."""
    allowed = {key: 2 * unit + UNDERFLOW for key, unit in rounding_unit(batch, truth, 2.0**-23).items()}
    if dtype != torch.float32:
        eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        for key in ("image", "text"):
            allowed[key] += eps / 2 * getattr(truth, key).abs().max().item() + smallest * eps
    return allowed


def rounds_ds(backend: str, *dtypes: torch.dtype) -> bool:
    """Whether a backend rounds dS to bfloat16 on this CPU, for features of these dtypes."""
    if backend != "native" or any(dtype != torch.bfloat16 for dtype in dtypes):
        return False
    return extension.load().cpu.instruction_set(extension.instruction_set()) in MULTIPLY_BFLOAT16


def rounding_of_ds(batch: Batch, truth: Outcome, dtype: torch.dtype) -> dict[str, float]:
    """What rounding dS to `dtype`, a half precision, may do to the gradients: half an eps of their mass."""
    of_similarities = 1 + batch.scale.item() + (batch.teacher_scale.item() if batch.want_consistency else 0)
    mass = rounding_unit(batch, truth, 1 / of_similarities)
    return {key: torch.finfo(dtype).eps / 2 * mass[key] for key in ("image", "text", "scale")}


def native_errors(batch: Batch, truth: Outcome, dtype: torch.dtype) -> dict[str, float]:
    """Allowed errors of the backend "native" on this CPU, for features that are all of `dtype`."""
    allowed = allowed_errors(batch, truth, dtype)
    if rounds_ds("native", dtype):
        for key, value in rounding_of_ds(batch, truth, dtype).items():
            allowed[key] += value
    return allowed


def errors(result: Outcome, truth: Outcome) -> dict[str, float]:
    pairs = {
        "loss": (
            result.retention.double() + result.consistency.double(),
            truth.retention + truth.consistency,
        ),
        "image": (result.image, truth.image),
        "text": (result.text, truth.text),
        "scale": (result.scale, truth.scale),
    }
    return {name: (a.double() - b).abs().max().item() for name, (a, b) in pairs.items()}


def assert_no_divergence(sweep: Sweep, batch: Batch, **options: int) -> None:
    """For a float32 batch whose student is its teacher: neither a loss nor a gradient beyond rounding.

    Not exactly 0: a library's product may round the same numbers differently from one call to the next, with the place
    of its operands in memory.
    """
    batch = replace(batch, want_retention=False)
    truth = outcome(eager.sweep, batch.to(torch.float64))
    found = outcome(sweep, batch, **options)
    allowed = allowed_errors(batch.to(torch.float64), truth, torch.float32)
    for key, error in errors(found, truth).items():
        assert error <= allowed[key], (key, error, allowed[key])
