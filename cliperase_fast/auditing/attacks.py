"""Attack a model with soft prompts in front of the forget caption and with rounded weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliperase_fast.auditing import metrics
from cliperase_fast.auditing.features import Encoding, pixels_of
from cliperase_fast.auditing.layout import Layout
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data import caption_key
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import evaluating, inference
from cliperase_fast.progress import Steps

LARGEST_TEST = 1000  # forget test images that attacks are scored on
LARGEST_GALLERY = 256  # concepts to choose from, where concepts are captions
CONTEXT = 4  # soft tokens
SHOTS = 16
STEPS = 50
LEARNING_RATE = 1e-2
BITS = (8, 4)


@dataclass(frozen=True)
class ForgetTest:
    """Hold forget test images and the concepts to choose from, to ask models whose features are not computed yet.

    images: int64 [m], numbers of the images in the test set. pixels: [m, 3, H, W]. prompts: the captions of each
    concept, whose features are averaged. image_of, concept_of: int64 [P], the matching pairs, ascending by image.
    kinds: int64 [K], the kind of each concept; an image is compared with concepts of its own kind. None: with all.
    """

    images: np.ndarray
    pixels: Tensor
    prompts: tuple[tuple[Any, ...], ...]
    image_of: np.ndarray
    concept_of: np.ndarray
    kinds: np.ndarray | None = None

    @classmethod
    def of(cls, adapter: ClipAdapter, sets: AuditSets, layout: Layout, how: Encoding) -> ForgetTest:
        """Take at most 1,000 forget images, and all classes; without classes the forget captions among 256."""
        rng = np.random.default_rng(how.seed)
        images = layout.forget_images
        if len(images) > LARGEST_TEST:
            images = np.sort(rng.choice(images, LARGEST_TEST, replace=False))
        image_of, concept_of = layout.pairs_among(images)
        if layout.has_classes:
            assert sets.test.prompts is not None
            prompts = tuple(tuple(of) for of in sets.test.prompts)
        else:
            own = np.unique(concept_of)
            rest = np.setdiff1d(np.arange(len(layout.names)), own)
            some = rng.choice(rest, min(len(rest), max(0, LARGEST_GALLERY - len(own))), replace=False)
            chosen = np.sort(np.concatenate([own, some]))
            prompts = tuple((layout.names[concept],) for concept in chosen)
            concept_of = np.searchsorted(chosen, concept_of)
        return cls(
            images, pixels_of(adapter, sets.test, images, how.cache), prompts, image_of, concept_of, layout.kinds
        )

    def named(self, adapter: ClipAdapter, how: Encoding) -> np.ndarray:
        """Return whether each image is nearer to a caption of its own than to those of all other concepts; bool [m]."""
        return self._first(self.image_features(adapter, how), self.concept_features(adapter, how))

    def _first(self, images: Tensor, concepts: Tensor) -> np.ndarray:
        pairs = self.image_of, self.concept_of
        return metrics.wrong_before_right(images, concepts, *pairs, item_kinds=self.kinds) == 0

    def among_rivals(self, targets: Tensor) -> Tensor:
        """Return what to add to logits so that only concepts of the target's kind count: 0 or -inf, float32.

        targets: int64 [B], concepts. Returns [B, K], or a scalar 0 where all concepts are of one kind.
        """
        if self.kinds is None:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        kinds = torch.as_tensor(self.kinds, dtype=torch.int64, device="cpu")
        logits = torch.zeros(len(targets), len(kinds), dtype=torch.float32, device="cpu")
        return logits.masked_fill_(kinds[targets][:, None] != kinds, -torch.inf)

    def image_features(self, adapter: ClipAdapter, how: Encoding) -> Tensor:
        """Encode the images; float32 [m, D] on the CPU."""
        with inference(adapter.module, how.device, how.precision):
            parts = [
                adapter.encode_image(part.to(how.device)).float().cpu() for part in self.pixels.split(how.batch_size)
            ]
        return torch.cat(parts)

    def concept_features(self, adapter: ClipAdapter, how: Encoding) -> Tensor:
        """Return the normalised mean over the captions of each concept; float32 [K, D] on the CPU."""
        row: dict[Any, int] = {}
        unique: list[Any] = []
        for caption in (one for of in self.prompts for one in of):
            if row.setdefault(caption_key(caption), len(unique)) == len(unique):
                unique.append(caption)
        with inference(adapter.module, how.device, how.precision):
            tokens = adapter.token_ids(unique)
            text = torch.cat([adapter.encode_text(part).float().cpu() for part in tokens.split(how.batch_size)])
        means = [text[[row[caption_key(one)] for one in of]].mean(0) for of in self.prompts]
        return F.normalize(torch.stack(means), dim=-1)


def quantised(adapter: ClipAdapter, bits: int) -> ClipAdapter:
    """Return a copy whose matrices (parameters of two or more dimensions) are rounded symmetrically for each channel.

    A channel is a row of the first dimension; its largest magnitude becomes 2^(bits - 1) - 1 steps.
    """
    copy = adapter.clone()
    steps = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for weight in copy.module.parameters():
            if weight.ndim >= 2 and weight.is_floating_point():
                largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
                size = (largest / steps).clamp_min(torch.finfo(weight.dtype).tiny)
                weight.copy_((weight / size).round() * size)
    return copy


def prompt_attack(
    adapter: ClipAdapter, sets: AuditSets, test: ForgetTest, how: Encoding, progress: Steps
) -> tuple[np.ndarray | None, str]:
    """Train a soft prompt for each forget concept; return which forget test images the model then names, bool [m].

    4 soft tokens follow the begin mark of every caption of a forget concept, as in CoOp (arXiv 2109.01134). 50 steps of
    Adam at 1e-2 train them on 16 forget training images with the cross entropy over all concepts (of the right one's
    kind) at the model's logit scale. The weights and the captions of other concepts do not change. Returns None and the
    reason for generic models, whose token embedding is not known, and if a caption leaves no room for 4 tokens.
    """
    table = token_embedding(adapter)
    if table is None:
        return None, "the token embedding of this kind of model is not known"
    concepts = np.unique(test.concept_of)
    limit = adapter.context_length
    tokens = [adapter.token_ids(test.prompts[concept]) for concept in concepts]  # [T, L] each
    lengths = [_read(adapter, part) for part in tokens]
    if limit is None or max(lengths) + CONTEXT > limit:
        return None, f"a forget caption of {max(lengths)} tokens leaves no room for {CONTEXT} more"
    rng = np.random.default_rng([how.seed, 1])
    chosen = np.sort(rng.choice(len(sets.forget), min(SHOTS, len(sets.forget)), replace=False))
    shots = sets.forget.subset(chosen)
    targets = _targets(shots, test, concepts)
    if targets is None:
        return None, "the forget training pairs show other concepts than the forget test pairs"
    spaced = [_with_room(part, adapter, how.device) for part in tokens]
    width = table.embedding_dim
    generator = torch.Generator("cpu").manual_seed(how.seed % 2**64)
    soft = 0.02 * torch.randn(len(concepts), CONTEXT, width, generator=generator, dtype=torch.float32, device="cpu")
    soft = soft.to(how.device).requires_grad_(True)
    fixed = test.concept_features(adapter, how).to(how.device)
    with inference(adapter.module, how.device, how.precision):
        pixels = pixels_of(adapter, shots, range(len(shots)), how.cache)
        images = adapter.encode_image(pixels.to(how.device)).float()
    optimizer = torch.optim.Adam([soft], lr=LEARNING_RATE)
    scale = adapter.logit_scale().detach()
    rivals = test.among_rivals(targets).to(how.device)

    def prompted() -> Tensor:  # [K, D]
        rows = []
        for number, part in enumerate(spaced):
            with _soft_tokens(table, soft[number]):
                rows.append(F.normalize(adapter.encode_text(part).float().mean(0), dim=-1))
        return fixed.index_copy(0, torch.as_tensor(concepts, dtype=torch.int64, device=fixed.device), torch.stack(rows))

    with evaluating(adapter.module), torch.enable_grad():
        for _ in range(STEPS):
            loss = F.cross_entropy(scale * images @ prompted().T + rivals, targets.to(how.device))
            (soft.grad,) = torch.autograd.grad(loss, [soft])  # no gradient reaches the weights
            optimizer.step()
            progress.update()
    with inference(adapter.module, how.device, how.precision):
        concept_features = prompted().float().cpu()
    return test._first(test.image_features(adapter, how), concept_features), ""


def token_embedding(adapter: ClipAdapter) -> nn.Embedding | None:
    """Return the token embedding of an open_clip or transformers model; None for other kinds."""
    if adapter.kind == "generic":
        return None
    for name, module in adapter.module.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == adapter.vocabulary_size:
            return module if adapter.tower(f"{name}.weight") == "text" else None
    return None


@contextmanager
def _soft_tokens(table: nn.Embedding, soft: Tensor) -> Iterator[None]:
    """Replace the embeddings of the tokens after the begin mark with `soft` [4, W]."""

    def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # [B, L, W]
        middle = soft.to(output.dtype).expand(len(output), -1, -1)
        return torch.cat([output[:, :1], middle, output[:, 1 + CONTEXT :]], dim=1)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _read(adapter: ClipAdapter, tokens: Tensor) -> int:
    """Return how many tokens of these captions are read: up to the last one that is not padding on the right."""
    differs = (tokens != tokens[:, -1:]).any(0)
    return min(tokens.shape[1], int(differs.nonzero().max()) + 2) if bool(differs.any()) else tokens.shape[1]


def _with_room(tokens: Tensor, adapter: ClipAdapter, device: torch.device) -> Tensor:
    """Return token ids [T, L] with 4 ordinary tokens after the begin mark, cut to the context length."""
    filler = tokens[:, 1:2].expand(-1, CONTEXT)
    limit = adapter.context_length
    return torch.cat([tokens[:, :1], filler, tokens[:, 1:]], dim=1)[:, :limit].to("cpu")


def _targets(shots: Any, test: ForgetTest, concepts: np.ndarray) -> Tensor | None:
    """Return the number of each shot's concept among those of the test; None if one is not among them."""
    if shots.labels is not None:
        labels = np.asarray(shots.labels)
        return torch.as_tensor(labels, dtype=torch.int64, device="cpu") if np.isin(labels, concepts).all() else None
    number = {caption_key(of[0]): index for index, of in enumerate(test.prompts)}
    found = [number.get(caption_key(group[0])) for group in shots.captions]
    return None if None in found else torch.tensor(found, dtype=torch.int64, device="cpu")
