"""Who computes the losses: this package's backends, open_clip, and peers that compute CLIP's or SigLIP's.

A provider is checked before it is timed, so an adapter may be wrong without a wrong number being reported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.ops.registry import REGISTRY, Backend
from cliperase_fast.ops.spec import SimilarityInputs
from cliperase_fast.validation import computes, implementation

from .batches import (
    CHECK_ROWS,
    DTYPES,
    LIMITS,
    LOSSES,
    WEIGHTS,
    Batch,
    Case,
    Loss,
    errors,
    functional_loss,
    make_batch,
    sigmoid_formula,
    truth,
)

BASELINES = ("open_clip", "open_clip-style")  # open_clip's own classes where installed, else the same formulas


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss.

    make: called with a case, gives the loss function; imports what it needs.
    package: the distribution it needs, if any. matrices: N x N matrices of the features' dtype alive at once, at the
    least; sizes that cannot fit are not tried. note: what it leaves out or does differently, of all three losses.
    """

    name: str
    make: Callable[[Case], Loss]
    losses: tuple[str, ...] = LOSSES
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None
    backend: str | None = None
    matrices: int = 0
    adds_entropy: bool = False
    scale_gradient: bool = True
    note: str = ""
    instead: str | None = None  # another loss, on as many rows, which is measured for comparison
    keep: str | None = None  # that it asks for

    def own_case(self, case: Case) -> Case:
        """Return the case that it computes when asked for this one."""
        return case if self.instead is None else replace(case, loss=self.instead)

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours-")

    def does_as_auto(self, batch: Batch) -> bool:
        """Return whether keep="auto" keeps as many bytes of this batch's similarities as this provider does."""
        if self.keep is None or self.backend is None or batch.bias is not None:
            return True
        kernels = implementation(REGISTRY[self.backend], batch.image.device).kernels
        assert kernels is not None
        sizes = {
            kernels.cache_size(
                SimilarityInputs(
                    batch.image, batch.text, batch.scale, batch.teacher_image, batch.teacher_text, batch.teacher_scale,
                    keep=keep,
                )
            )
            for keep in (self.keep, "auto")
        }  # fmt: skip
        return len(sizes) == 1

    def limit(self, dtype: torch.dtype) -> float:
        return LIMITS[dtype] * (0.1 if self.ours else 1.0)

    def why_not(self, case: Case, device: str) -> str | None:
        """Why it cannot be asked for this; None when it can."""
        if case.loss not in self.losses:
            return f"does not compute {case.loss}, only {', '.join(self.losses)}"
        if device not in self.devices:
            return _needs(self.devices)
        if self.package is not None and version(self.package) is None:
            return f"{self.package} is not installed"
        if self.backend is not None:
            backend = REGISTRY[self.backend]
            if (missing := backend.missing) is not None:
                return missing
            if backend.devices is not None and device not in backend.devices:
                return _needs(backend.devices)
            if not computes(backend, case.loss, device):
                return f"does not compute {case.loss} on {device}"
        return None


def _needs(devices: Collection[str]) -> str:
    return "needs a GPU" if set(devices) == {"cuda"} else f"runs on {', '.join(devices)} only"


def check(provider: Provider, case: Case, device: str) -> tuple[float, str | None]:
    """(worst relative error, what is wrong if it is too large) against float64, on a smaller batch of the same kind."""
    small = provider.own_case(replace(case, n=min(case.n, CHECK_ROWS)))
    batch = make_batch(small, device, seed=1)
    found = errors(provider.make(small), batch, truth(batch), provider.adds_entropy, provider.scale_gradient)
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
    limit = provider.limit(DTYPES[case.dtype])
    right = all(error <= limit for error in found.values())  # false for NaN as well
    what = "loss" if worst == "loss" else f"gradient of {worst}"
    return found[
        worst
    ], None if right else f"{what} is off by {found[worst]:.1e}, more than {limit:.0e}, from float64's"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def every_provider() -> dict[str, Provider]:
    providers = [*_own(), *_open_clip(), *_peers()]
    return {provider.name: provider for provider in providers}


def default_names(loss: str) -> list[str]:
    """Who computes this loss; the copy of open_clip's formulas only where open_clip itself is not installed."""
    skipped = BASELINES[1] if version("open_clip_torch") is not None else BASELINES[0]
    known = every_provider().items()
    return [
        name for name, provider in known if loss in provider.losses and name not in (skipped, f"{skipped}-compiled")
    ]


def _own() -> list[Provider]:
    chosen = "the backend and keep= are chosen by device, size and width"
    cliperase = _ours("cliperase", "", {}, None, "cliperase_loss of as many retain pairs", ("calibrated",), "auto")
    providers = [_ours("auto", "", {}, None, f"what users get: {chosen}"), replace(cliperase, instead="cliperase")]
    for name, backend in REGISTRY.items():
        if backend.keeps:
            providers += [
                _ours(name, f"-keep-{keep}", {"keep": keep}, name, note, _swept(backend))
                for keep, note in _KEEPING.items()
            ]
            sigmoid = _ours(name, "", {}, name, "gradients are formed in the forward pass", ("siglip",))
            only = backend.loss_devices.get("sigmoid")
            providers.append(sigmoid if only is None else replace(sigmoid, devices=only))
        else:
            note = "the reference; holds N x N matrices" if name == "eager" else "forms the similarities twice"
            providers.append(_ours(name, "", {}, name, note))
    return providers


def _swept(backend: Backend) -> tuple[str, ...]:
    """Return the losses of a backend for which `keep` makes a difference."""
    return (
        ("cliperase", "clip", "calibrated") if backend.loss_devices.get("calibrated") != () else ("cliperase", "clip")
    )


_KEEPING = {
    "nothing": "forms the similarities twice",
    "similarities": "keeps them within CLIPERASE_KEEP_MIB, else forms them twice",
}


def _ours(
    backend: str,
    suffix: str,
    options: dict[str, str],
    registered: str | None,
    note: str,
    losses: tuple[str, ...] = LOSSES,
    asked: str | None = None,
) -> Provider:
    return Provider(
        f"ours-{backend}{suffix}",
        lambda case: functional_loss(asked or backend, **options),
        losses=losses,
        # In Triton's interpreter a time says nothing.
        devices=("cuda",) if backend == "triton" else ("cpu", "cuda"),
        backend=registered,
        matrices=6 if backend == "eager" else 0,
        note=note,
        keep=options.get("keep"),
    )


def clip_terms(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(contrastive loss, logits of the images, logits of the texts), as open_clip's ClipLoss forms them."""
    per_image = scale * image @ text.T  # [N, N]
    per_text = scale * text @ image.T  # [N, N]
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2, per_image, per_text


def distill_clip_loss(
    image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(contrastive, distillation) of open_clip's DistillClipLoss: a cross-entropy with the teacher's softmax."""
    contrastive, per_image, per_text = clip_terms(image, text, scale)
    halves = []
    for student, own, other in ((per_image, teacher_image, teacher_text), (per_text, teacher_text, teacher_image)):
        teacher = teacher_scale * own @ other.T  # [N, N]
        halves.append(-(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean())
    return contrastive, (halves[0] + halves[1]) / 2


def _open_clip_style(case: Case) -> Loss:
    if case.loss == "siglip":
        return sigmoid_formula
    return _assembled(lambda *args: clip_terms(*args)[0], distill_clip_loss)


def _open_clip_own(case: Case) -> Loss:
    from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

    if case.loss == "siglip":
        sigmoid = SigLipLoss()
        return lambda *fields: sigmoid(*fields[:3], fields[-1])  # image, text, scale, bias
    return _assembled(ClipLoss(), DistillClipLoss())


def _assembled(clip: Callable[..., Tensor], distill: Callable[..., tuple[Tensor, Tensor]]) -> Loss:
    """RM + FM + CM from open_clip's terms.

    Its distillation term is half of (row + column) cross-entropy, and a cross-entropy is the divergence plus the
    teacher's entropy, a constant: twice the term has CM's gradients and CM's value plus the entropies.
    """
    retain, forget, consistency = WEIGHTS

    def loss(
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        teacher_image: Tensor | None,
        teacher_text: Tensor | None,
        teacher_scale: Tensor | None,
        forget_image: Tensor | None,
        forget_text: Tensor | None,
        bias: None = None,
    ) -> Tensor:
        if forget_image is None or forget_text is None:
            return clip(image, text, scale)
        contrastive, distillation = distill(image, text, scale, teacher_image, teacher_text, teacher_scale)
        cosine = (forget_image * forget_text).sum(1).mean()
        return retain * contrastive + 2 * consistency * distillation + forget * cosine

    return loss


def _open_clip() -> list[Provider]:
    made = []
    for name, make, package in (
        ("open_clip", _open_clip_own, "open_clip_torch"),
        ("open_clip-style", _open_clip_style, None),
    ):
        note = "holds N x N matrices; CM plus the teacher's entropies, a constant; FM is added here"
        common: dict[str, Any] = {
            "package": package, "adds_entropy": True, "matrices": 4, "losses": ("cliperase", "clip", "siglip"),
        }  # fmt: skip
        made.append(Provider(name, make, note=note, **common))
        compiled = f"torch.compile, for each shape by itself; {note}"
        made.append(Provider(f"{name}-compiled", _compiled(make), note=compiled, **common))
    return made


def _compiled(make: Callable[[Case], Loss]) -> Callable[[Case], Loss]:
    def compiled(case: Case) -> Loss:
        # Each size is compiled for itself, the fastest case; the default limit of 8 would fall back to eager.
        torch._dynamo.config.recompile_limit = 1000
        return torch.compile(make(case), dynamic=False, fullgraph=True)

    return compiled


def _both_directions(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """CLIP's loss from a function of (scaled queries, keys, labels) that has one direction only."""

    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: None) -> Tensor:
        labels = torch.arange(len(image), device=image.device)
        factor = scale.to(image.dtype)
        return (one(factor * image, text, labels) + one(factor * text, image, labels)) / 2

    return loss


def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    module: MemoryEfficientCLIPLoss | None = None

    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: None) -> Tensor:
        nonlocal module
        if module is None:  # the temperature is a number; read once, so that no timed step waits for the device
            module = MemoryEfficientCLIPLoss(temperature=1 / scale.item(), normalized_inputs=True, stable=False)
        return module(image, text)

    return loss


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    head = next((head for head in (256, 128, 64, 32, 16) if case.width % head == 0), None)
    if head is None:
        raise ValueError(f"inf-cl takes widths divisible by 16, not {case.width}")
    return _both_directions(lambda query, key, labels: cal_flash_loss(query, key, labels, head_dim=head).mean())


def _cut_cross_entropy(**options: Any) -> Callable[[Case], Loss]:
    def make(case: Case) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return _both_directions(lambda query, key, labels: linear_cross_entropy(query, key, labels, **options))

    return make


def _liger(case: Case) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _both_directions(liger_fused_linear_cross_entropy)


def _siglip_kernel(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        return fused_siglip_loss(image, text, scale.log(), rest[-1])  # it takes the logarithm, and exponentiates

    return loss


def _peers() -> list[Provider]:
    """After inf-cl 1.2.1, memeff 0.3.1, cut-cross-entropy 25.1.1, liger-kernel 0.8.5 and siglip-kernel 0.1.2."""
    common: dict[str, Any] = {"losses": ("clip",), "devices": ("cuda",)}
    cce = "two calls; no FM or CM"
    return [
        Provider(
            "memeff", _memeff, package="memeff", scale_gradient=False, note="no gradient of the scale; no FM or CM",
            **common,
        ),
        Provider(
            "inf-cl", _inf_cl, package="inf-cl", note="two calls; float32 inside, multiplied in tf32; no FM or CM",
            **common,
        ),
        Provider(
            "cut-cross-entropy", _cut_cross_entropy(), package="cut-cross-entropy",
            note=f"{cce}; leaves small gradients out (filter_eps, its default)", **common,
        ),
        Provider(
            "cut-cross-entropy-exact", _cut_cross_entropy(filter_eps=None), package="cut-cross-entropy",
            note=f"{cce}; filter_eps=None", **common,
        ),
        Provider(
            "liger-kernel", _liger, package="liger-kernel",
            note="two calls of its fused linear cross-entropy; gradients in the forward pass; no FM or CM", **common,
        ),
        Provider(
            "siglip-kernel", _siglip_kernel, losses=("siglip",), devices=("cuda",), package="siglip-kernel",
            note="its own choice of kernel for the dtype; gradients in the forward pass; the sigmoid loss only",
        ),
    ]  # fmt: skip
