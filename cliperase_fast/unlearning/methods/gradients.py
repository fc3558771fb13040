"""Gradients of losses over training batches, for methods that change weights without the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.errors import UnlearningError, tell_out_of_memory
from cliperase_fast.unlearning.batches import Batch, BatchLoader, BatchPlan
from cliperase_fast.unlearning.engines.base import train_mode
from cliperase_fast.unlearning.methods.base import TERM_SETTINGS, TRAINING_SETTINGS, ClosedFormMethod
from cliperase_fast.unlearning.objective import BatchFeatures
from cliperase_fast.unlearning.run import Run
from cliperase_fast.unlearning.trainer import constant_bias

# A loss over the batch of all ranks: the mean of its gradients over the ranks is that of the whole batch.
Loss = Callable[[BatchFeatures], Tensor]


class GradientMethod(ClosedFormMethod):
    """A closed-form method that reads gradients. They are computed in float32, without dropout.

    On several ranks each one has its share of every batch, and the gradients are averaged.
    """

    needs_gradient = True
    unused_settings = (TERM_SETTINGS | TRAINING_SETTINGS) - {"batch_size", "forget_fraction", "false_negatives"}


class AllPairs(BatchPlan):
    """Batches of all training pairs, whether to be forgotten or not, as if all were retain pairs."""

    @classmethod
    def of(cls, run: Run) -> AllPairs:
        plan, count = run.loader.plan, len(run.data.train.pairs)
        size = min(sum(plan.sizes), count)
        return cls(plan.n_forget, count, 1, size, "retain", plan.seed, with_forget=False)

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        none, drawn = super().batch(number)
        return none, drawn - self.n_forget  # a loader adds n_forget to the indices of retain pairs


def loader_of_all(run: Run) -> BatchLoader:
    """Return a loader of batches of all training pairs."""
    return BatchLoader(
        run.data.train.pairs,
        AllPairs.of(run),
        run.captions,
        transform=run.setup.transform,
        random_transform=run.setup.random_views,
        group_ids=run.loader.group_ids,
        num_workers=run.settings.num_workers,
        ranks=run.ranks,
        cache=run.loader.pixels.cache,
        substitutes=run.loader.substitutes,
    )


def forget_batches(run: Run) -> int:
    """Return how many joint batches hold every forget pair once, but for an incomplete last batch."""
    return run.loader.plan.n_forget // run.loader.plan.forget_pairs


def gradients(run: Run, loader: BatchLoader, numbers: range, losses: Sequence[Loss]) -> Iterator[list[list[Tensor]]]:
    """Yield, for each batch of these numbers, the gradient of each loss with respect to `run.parameters`.

    The student is in training mode meanwhile, without dropout.
    """
    train_mode(run.student.module, drops_out=False)
    for number, batch in zip(numbers, loader.batches(numbers.start, numbers.stop), strict=True):
        forget, retain = (len(side) for side in loader.plan.batch(number))
        yield _gradients_of(run, batch, (forget, retain), losses)


def _gradients_of(run: Run, batch: Batch, sizes: tuple[int, int], losses: Sequence[Loss]) -> list[list[Tensor]]:
    parameters = [parameter for _, parameter in run.parameters]
    remedy = f"give a smaller batch_size (now {run.settings.pairs_per_batch})"
    with torch.enable_grad(), tell_out_of_memory("the gradient of a batch", remedy):
        image, text = (
            run.student.encode_image(batch.pixels.to(run.runtime.device)),
            run.student.encode_text(batch.tokens),
        )
        features = features_of(run, batch, sizes, image, text, run.student.logit_scale())
        found = []
        for index, loss in enumerate(losses):
            more = index + 1 < len(losses)
            parts = torch.autograd.grad(loss(features), parameters, retain_graph=more, allow_unused=True)
            found.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)])
    for gradient in found:
        run.ranks.all_reduce_mean(gradient)
        if not all(part.isfinite().all() for part in gradient):
            raise UnlearningError(
                "the gradient of a batch of training pairs is not finite: the model's weights or arithmetic overflow; "
                "nothing was changed"
            )
    return found


def features_of(
    run: Run, batch: Batch, sizes: tuple[int, int], image: Tensor, text: Tensor, scale: Tensor
) -> BatchFeatures:
    """Return the features of a batch as a loss takes them.

    sizes: forget and retain pairs of all ranks. image: [M + N, D]; text: of the different captions [U, D].
    """
    device = run.runtime.device
    forget, retain = ([part.stop - part.start for part in run.ranks.shares(size)] for size in sizes)
    return BatchFeatures(
        image=image,
        text=text.index_select(0, batch.text_of_pair.to(device)),
        logit_scale=scale,
        logit_bias=constant_bias(run.student),
        n_forget=batch.n_forget,
        group_ids=None if batch.group_ids is None else batch.group_ids.to(device),
        ranks=run.ranks,
        counts=(forget, retain),
    )
