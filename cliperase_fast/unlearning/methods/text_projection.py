"""Text projection: project the forget captions' directions out of the last matrix of the text tower.

    W [w, D] the text projection, features of a caption = normalise(h W); h [w] scaled to length 1
    F [F, w] the h of the different forget captions, R [R, w] those of the other captions of the training split
    D = F - mean(R)                                the directions that set forget captions apart from the average one
    G = RᵀR / R,  M = r (G + r I)⁻¹                r = ridge * trace(G) / w; M -> the projection off the span of R
    Q = M Dᵀ (D M Dᵀ)⁺ D                           the projection onto D that moves the rows of R least
    W' = (I - s Q) W                               strength s from 0 to 1

At s = 1 a forget caption has the features of the average other caption. Where the rank of R is less than w, M is the
projection off the span of R itself (r -> 0), so that captions in that span keep their features to 1e-6. Directions of D
whose part off that span is shorter than a tenth of the longest one are left alone: to remove them, Q would have to be
large, and would move other captions too.

The largest strength within the floor is found on the validation split: 1 if that is within it, otherwise by bisection.
With select="divergence" it is the smallest that reaches the target.

Source: arXiv 2512.14137, which projects in the space of the features. A projection there does little to the cosine of a
caption with its own images, since features are scaled to length 1 afterwards: it leaves the part of the caption nearest
to them. Here the projection is on the other side of W.

Limits: the image tower keeps what it knows. Captions with parts of forget captions that no other caption of the data
has, such as the same word in another sentence, change too. The text tower must end in one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import inference
from cliperase_fast.unlearning.batches import CaptionTable
from cliperase_fast.unlearning.methods.base import ClosedFormMethod
from cliperase_fast.unlearning.methods.strength import forgets_too_little, search_strength
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.selection import Candidate
from cliperase_fast.unlearning.splits import Split

_NULL = 3e-7  # root mean square of unit rows along a direction that they do not use: the rounding of float32 features
_SHORTEST = 0.1  # of the longest direction
_AGREES = 1e-4  # largest difference between features and those computed from the head alone


@dataclass(frozen=True)
class TextProjectionOptions:
    """ridge: the smaller, the more the other captions count; in units of the mean eigenvalue of G."""

    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:  # false for NaN as well
            raise InputError(f"ridge={self.ridge} must be a finite number above 0")


class TextProjection(ClosedFormMethod):
    """An edit of one matrix that reads captions only, see the module. On several ranks the first one computes it."""

    name = "text_projection"
    summary = "project the forget captions' directions out of the text projection, in closed form and without images"
    source = "arXiv 2512.14137"
    Options = TextProjectionOptions

    def check_model(self, model: ClipAdapter, train: Split, captions: CaptionTable) -> None:
        head = TextHead.of(model)
        forget, retain = caption_rows(train, captions)
        if len(retain) == 0:
            raise InputError(
                f"method={self.name!r} tells captions apart, and the forget and the retain pairs have the same "
                f"{len(forget)} captions: choose a method that reads images"
            )
        head.check(model, captions.rows(forget[:2]))

    def edit(self, run: Run, evaluate: Callable[[], Candidate]) -> None:
        head = TextHead.of(run.student)
        original = head.weight.detach().clone()
        removed: dict[str, Tensor] = {}
        run.ranks.run_on_first(lambda: removed.update(part=self._projected(run, head)))
        part = run.ranks.broadcast_tensors(removed)["part"].to(original.device)  # [w, D] float64

        def evaluate_at(strength: float) -> Candidate:
            head.write(head.oriented(original).double() - strength * part)
            return evaluate()

        wants_more = run.selection.within if run.target is None else forgets_too_little(run)
        search_strength(evaluate_at, wants_more, most=1.0)

    def _projected(self, run: Run, head: TextHead) -> Tensor:
        """Return Q W in float64, on the CPU."""
        forget, retain = caption_rows(run.data.train, run.captions)

        def inputs(rows: np.ndarray) -> Iterator[Tensor]:  # yields [n, w] in parts
            for start in range(0, len(rows), run.runtime.batch_size):
                part = run.captions.rows(rows[start : start + run.runtime.batch_size])
                yield F.normalize(head.inputs(run.student, part).double().cpu(), dim=1)

        gram, mean = _moments(inputs(retain))
        projection = ridge_projection(torch.cat(list(inputs(forget))), gram, mean, self.options.ridge)
        if projection is None:
            raise UnlearningError(
                f"the {len(retain)} other captions span the directions of the {len(forget)} forget captions, so no "
                "projection removes these and keeps those; use another method"
            )
        return projection @ head.oriented(head.weight.detach()).double().cpu()


@dataclass(frozen=True)
class TextHead:
    """The last matrix of a text tower: a bare parameter [w, D] that multiplies rows, or the weight of a linear layer.

    name: of the parameter. owner: the module that holds it, as `attribute`.
    """

    name: str
    owner: nn.Module
    attribute: str

    @classmethod
    def of(cls, model: ClipAdapter) -> TextHead:
        """Find it by name. Raises InputError unless exactly one matrix follows the text tower's blocks."""
        found = [
            name
            for name, parameter in model.module.named_parameters()
            if parameter.ndim > 1 and model.tower(name) == "text" and model.is_tail(name) and "pool" not in name
        ]
        if len(found) != 1:
            raise InputError(_refusal(model, ", ".join(found) or "none that its name tells"))
        path, _, attribute = found[0].rpartition(".")
        return cls(found[0], model.module.get_submodule(path), attribute)

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.owner, self.attribute)

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as [w, D]."""
        return weight.T if isinstance(self.owner, nn.Linear) else weight

    def write(self, weight: Tensor) -> None:
        """Copy [w, D] into the parameter."""
        with torch.no_grad():
            self.oriented(self.weight).copy_(weight)

    def inputs(self, model: ClipAdapter, tokens: Tensor) -> Tensor:  # [B, L] -> [B, w]
        """Return what the head multiplies, up to the length of each row: the features with the identity as the head."""
        with self._identity(), inference(model.module, model.device, "fp32"):
            return model.text_output(tokens).float()

    def check(self, model: ClipAdapter, tokens: Tensor) -> None:
        """Raise InputError unless these captions' features are those of the head's input times the head."""
        try:
            rows = self.inputs(model, tokens)
            bias = getattr(self.owner, "bias", None) if isinstance(self.owner, nn.Linear) else None
            expected = F.normalize(F.linear(rows, self.oriented(self.weight.detach()).T.float(), bias), dim=1)
        except RuntimeError as error:  # the identity has another shape
            raise InputError(_refusal(model, self.name)) from error
        with inference(model.module, model.device, "fp32"):
            features = model.encode_text(tokens).float()
        if not torch.allclose(features, expected, rtol=0, atol=_AGREES):
            raise InputError(_refusal(model, self.name))

    @contextmanager
    def _identity(self) -> Iterator[None]:
        """Put the identity in the place of the parameter, without a bias, and then the parameter back."""
        kept = dict(self.owner._parameters)
        width = self.oriented(self.weight).shape[0]
        identity = torch.eye(width, dtype=self.weight.dtype, device=self.weight.device)
        self.owner._parameters[self.attribute] = nn.Parameter(identity, requires_grad=False)
        if isinstance(self.owner, nn.Linear):
            self.owner._parameters["bias"] = None
        try:
            yield
        finally:
            self.owner._parameters.update(kept)


def caption_rows(train: Split, captions: CaptionTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the forget pairs' captions and those of all other captions, in the caption table."""
    forget = np.unique(np.concatenate(captions.of_pair[: train.n_forget]))
    retain = np.unique(np.concatenate(captions.of_pair[train.n_forget :]))
    return forget, np.setdiff1d(retain, forget)


def ridge_projection(forget: Tensor, gram: Tensor, mean: Tensor, ridge: float) -> Tensor | None:
    """Return Q [w, w] of the module's formula; None if no direction can be removed.

    forget: unit rows [F, w]. gram: G [w, w] and mean [w] of the other captions' unit rows. All float64 on the CPU.
    """
    values, vectors = torch.linalg.eigh(gram)
    null = values <= _NULL**2
    weight = ridge * gram.trace() / len(gram)
    roots = null.double() if null.any() else (weight / (values.clamp(min=0) + weight)).sqrt()
    root = (vectors * roots) @ vectors.T  # the square root of M
    directions = forget - mean  # D
    left, lengths, right = torch.linalg.svd(directions @ root, full_matrices=False)
    if lengths[0] <= _NULL:
        return None
    kept = lengths > _SHORTEST * lengths[0]
    return root @ (right[kept].T / lengths[kept]) @ left[:, kept].T @ directions


def _moments(parts: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean outer product [w, w] and the mean [w] of rows that come in parts."""
    count = 0
    gram, total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for rows in parts:
        count, gram, total = count + len(rows), gram + rows.T @ rows, total + rows.sum(0)
    return gram / count, total / count


def _refusal(model: ClipAdapter, found: str) -> str:
    return (
        f"method='text_projection' edits the one matrix that a text tower ends in, and the text tower of this "
        f"{type(model.module).__name__} does not end in one (matrices after its blocks: {found}); use another method"
    )
