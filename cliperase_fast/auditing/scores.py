"""Compute the scores that need features only; each function has the exact definition of its score.

A `View` is one model on the audited pairs. Every function returns an `Estimate`, or several by name. All scores lie
between 0 and 1, but for cosines (-1 to 1) and `worst_class_drop` (-1 to 1). Unless a definition says otherwise, a score
is the mean over the classes of the mean over the images of a class; in data without classes it is the mean over the
images. Where classes have kinds, an image is compared with the captions of its own class's kind, and a caption with
the images of its kind. Ties of cosines count against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cliperase_fast.auditing import metrics
from cliperase_fast.auditing.estimates import (
    DRAWS,
    MISSING,
    Estimate,
    auc_estimate,
    mean_estimate,
    missing,
    resampled_counts,
    resampled_means,
    stratified_mean,
)
from cliperase_fast.auditing.layout import Layout

RECALL_AT = (1, 5, 10)
NEIGHBOURS = 3
FEWEST_NEGATIVES = 1000  # for a true positive rate at 1 % false positives
_LARGEST_GALLERY = 2**25 // DRAWS  # images that `mrr_text_to_image` resamples
NO_CLASSES = "the data has no classes"


@dataclass(frozen=True)
class Variant:
    """Hold other captions for concepts.

    name: the template or the synonym. concept: the only concept that is renamed, or None for all of them.
    features: [K, D], the captions of all concepts, or [1, D] of the renamed one; rows of unit length.
    """

    name: str
    concept: int | None
    features: Tensor


@dataclass(frozen=True)
class Features:
    """Hold the features of the pairs from one model; float32 on the CPU, rows of unit length.

    images: [n, D]. captions: [U, D], every different caption. concepts: [K, D], the mean caption of each class over the
    templates, normalised again; without classes the captions themselves.
    variants: other captions for the concepts.
    other: for each other data set (images [m, D], classes [C, D], labels [m]).
    holdouts: "association" and "identity" as (images [m, D], captions [V, D], image_of [P], caption_of [P]).
    training_cosines, test_cosines: for `membership`, of forget images with their own captions, the mean over views.
    """

    images: Tensor
    captions: Tensor
    concepts: Tensor
    variants: tuple[Variant, ...] = ()
    other: Mapping[str, tuple[Tensor, Tensor, np.ndarray]] = field(default_factory=dict)
    holdouts: Mapping[str, tuple[Tensor, Tensor, np.ndarray, np.ndarray]] = field(default_factory=dict)
    training_cosines: np.ndarray | None = None
    test_cosines: np.ndarray | None = None


@dataclass(frozen=True)
class View:
    """Hold one model's view of the audited pairs. before: the original's features, for scores relative to it."""

    layout: Layout
    features: Features
    before: Features
    seed: int = 0

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether each image is nearer to a caption of its own than to that of every other concept; bool [n]."""
        return _correct(self.layout, self.features.images, self.features.concepts)

    @cached_property
    def neighbours(self) -> np.ndarray:
        """The `NEIGHBOURS` other concepts nearest to a forget concept: by cosine of captions in the original."""
        return neighbours(self.before.concepts, self.layout)

    def mean(self, values: np.ndarray, images: np.ndarray) -> Estimate:
        """Return the class-weighted mean of values [m] of some images [m]."""
        return stratified_mean(values, self.layout.strata[images], seed=self.seed)


def neighbours(concepts: Tensor, layout: Layout, count: int = NEIGHBOURS) -> np.ndarray:
    """Return at most `count` other concepts with the largest cosine to any forget concept, nearest first; int64."""
    nearness = metrics.largest_cosines(concepts[layout.other_concepts], concepts[layout.forget_concepts])
    return layout.other_concepts[np.argsort(-nearness, kind="stable")[:count]]


def association(view: View) -> Estimate:
    """Mean cosine of forget images with their own captions (the class caption; without classes the mean over the
    image's captions)."""
    return view.mean(_own(view, view.layout.forget_images), view.layout.forget_images)


def mrr(view: View) -> dict[str, Estimate]:
    """Mean reciprocal rank for the forget concepts, in both directions and their mean.

    mrr_image_to_text: for each forget image 1 / rank of its concept's caption among the captions of all K concepts; of
        several right captions the best one counts.
    mrr_text_to_image: for each forget concept's caption 1 / rank of the best image of the concept among all audited
        images (of concepts of its kind), mean over the forget concepts. Its bootstrap resamples the images within the
        classes (without classes: the captions); no interval for galleries of more than some 33,000 images.
    mrr: the mean of the two.
    """
    layout, features = view.layout, view.features
    mine = layout.forget_images
    images, pairs = features.images[mine], layout.pairs_among(mine)
    ranks = 1 + metrics.wrong_before_right(images, features.concepts, *pairs, item_kinds=layout.kinds)
    forward = view.mean(1 / ranks, mine)
    reverse = _text_to_image_mrr(view)
    return {"mrr": mean_estimate([forward, reverse]), "mrr_image_to_text": forward, "mrr_text_to_image": reverse}


def _text_to_image_mrr(view: View) -> Estimate:
    layout, images = view.layout, view.features.images
    asked = np.flatnonzero(np.isin(layout.concept_of, layout.forget_concepts))
    query_of = np.searchsorted(layout.forget_concepts, layout.concept_of[asked])
    queries = view.features.concepts[layout.forget_concepts]
    if not layout.has_classes:
        found = 1 / (1 + metrics.wrong_before_right(queries, images, query_of, layout.image_of[asked]))
        return stratified_mean(found, seed=view.seed)
    kinds = None if layout.kinds is None else layout.kinds[layout.strata]  # [n], of images
    ranks = metrics.wrong_before_right(queries, images, query_of, layout.image_of[asked], item_kinds=kinds)
    found = 1 / (1 + ranks)
    if len(images) > _LARGEST_GALLERY:
        return Estimate(float(found.mean()))
    counts = np.zeros((DRAWS, len(images)), dtype=np.float32)
    for number, stratum in enumerate(np.unique(layout.strata)):
        members = np.flatnonzero(layout.strata == stratum)
        counts[:, members] = resampled_counts.__wrapped__(len(members), view.seed, number)
    matches = layout.strata == layout.forget_concepts[:, None]  # [F, n]
    parts = [(np.arange(len(queries)), np.arange(len(images)))]  # the queries and the images that each searches
    if layout.kinds is not None and kinds is not None:
        own = layout.kinds[layout.forget_concepts]
        parts = [(np.flatnonzero(own == kind), np.flatnonzero(kinds == kind)) for kind in np.unique(own)]
    draws = [
        metrics.first_right(queries[rows], images[items], matches[rows][:, items], counts[:, items])
        for rows, items in parts
    ]
    return Estimate(float(found.mean()), np.concatenate(draws).mean(0))


def zero_shot_top1(view: View) -> Estimate:
    """Share of forget images nearer to their own class than to every other class; None without classes."""
    if not view.layout.has_classes:
        return missing(NO_CLASSES)
    mine = view.layout.forget_images
    return view.mean(view.correct[mine], mine)


def recall(view: View) -> dict[str, Estimate]:
    """Retrieval as in `cliperase_fast.evaluate`, for k of 1, 5 and 10.

    image_to_text_r@k: share of forget images with one of their captions among the k nearest of all different captions.
    text_to_image_r@k: share of the different captions of forget images with an image that carries the caption among the
        k nearest of all images; the mean over captions, which are also what is resampled.
    """
    layout, features = view.layout, view.features
    images, captions = features.images, features.captions
    mine = layout.forget_images
    own = layout.forget[layout.caption_image_of]
    image_of = np.searchsorted(mine, layout.caption_image_of[own])
    image_ranks = metrics.wrong_before_right(images[mine], captions, image_of, layout.caption_of[own])
    asked = np.unique(layout.caption_of[own])
    theirs = np.isin(layout.caption_of, asked)
    query_of = np.searchsorted(asked, layout.caption_of[theirs])
    caption_ranks = metrics.wrong_before_right(captions[asked], images, query_of, layout.caption_image_of[theirs])
    return {
        **{f"image_to_text_r@{k}": view.mean(image_ranks < k, mine) for k in RECALL_AT},
        **{f"text_to_image_r@{k}": stratified_mean(caption_ranks < k, seed=view.seed) for k in RECALL_AT},
    }


def paraphrase_top1(view: View) -> dict[str, Estimate]:
    """`zero_shot_top1` under other names: templates, synonyms, plurals and hypernyms.

    A template renames all classes; a synonym renames its class alone, and only images of that class are asked for.
    paraphrase_top1: for each forget image the mean over the variants that apply to it, then the mean over the images.
        "variants" holds the result of each.
    paraphrase_top1_max: the variant with the highest result, named under "variant".
    None without classes or variants.
    """
    layout, features = view.layout, view.features
    names = ("paraphrase_top1", "paraphrase_top1_max")
    if not layout.has_classes:
        return dict.fromkeys(names, missing(NO_CLASSES))
    mine = layout.forget_images
    hits, asked = np.zeros(len(layout.forget)), np.zeros(len(layout.forget))
    single: dict[str, Estimate] = {}
    for variant in features.variants:
        concepts, members = variant.features, mine
        if variant.concept is not None:
            concepts = features.concepts.clone()
            concepts[variant.concept] = variant.features[0]
            members = mine[layout.strata[mine] == variant.concept]
        if len(members) == 0:
            continue
        correct = _correct(layout, features.images[members], concepts, members)
        hits[members] += correct
        asked[members] += 1
        single[variant.name] = view.mean(correct, members)
    if not single:
        return dict.fromkeys(names, missing("no other names are known: give synonyms or paraphrase_templates"))
    members = mine[asked[mine] > 0]
    mean = view.mean(hits[members] / asked[members], members)
    best = max(single, key=lambda name: single[name].value or 0.0)
    results = {name: estimate.value for name, estimate in single.items()}
    return {
        names[0]: Estimate(mean.value, mean.draws, {"variants": results}),
        names[1]: Estimate(single[best].value, single[best].draws, {"variant": best}),
    }


def retain_top1(view: View) -> Estimate:
    """Share of retain images nearer to a caption of their own than to that of every other concept.

    Without classes, concepts are all captions and this is image-to-text recall at 1.
    """
    kept = view.layout.retain_images
    return view.mean(view.correct[kept], kept)


def retain_association(view: View) -> Estimate:
    """Mean cosine of retain images with their own captions, as `association`."""
    return view.mean(_own(view, view.layout.retain_images), view.layout.retain_images)


def worst_class_drop(view: View) -> Estimate:
    """The largest loss of zero-shot accuracy, original minus this model, among the classes of the retain images.

    The interval is that of this class alone, resampling its images; "class" names it. With few images a class the
    largest of many losses is partly chance: look at the interval. None without classes.
    """
    layout = view.layout
    if not layout.has_classes:
        return missing(NO_CLASSES)
    before = _correct(layout, view.before.images, view.before.concepts)
    lost = before.astype(np.float64) - view.correct  # [n]
    kept = layout.retain_images
    by_class = {int(label): lost[kept[layout.strata[kept] == label]] for label in np.unique(layout.strata[kept])}
    if not by_class:
        return MISSING
    worst = max(by_class, key=lambda label: by_class[label].mean())
    values = by_class[worst]
    draws = resampled_means(values, view.seed, worst) if len(values) > 1 else None
    return Estimate(float(values.mean()), draws, {"class": layout.names[worst]})


def neighbours_top1(view: View) -> Estimate:
    """`retain_top1` over the 3 retain classes whose captions are nearest to a forget caption in the original.

    "classes" names them, nearest first; fewer where there are fewer. None without classes.
    """
    layout = view.layout
    if not layout.has_classes:
        return missing(NO_CLASSES)
    images = np.flatnonzero(np.isin(layout.strata, view.neighbours) & ~layout.forget)
    found = view.mean(view.correct[images], images)
    return Estimate(found.value, found.draws, {"classes": [layout.names[concept] for concept in view.neighbours]})


def image_side(view: View) -> Estimate:
    """Mean cosine of forget images with other captions: those of concepts that no forget image shows.

    Other concepts weigh the same; None where there are none.
    """
    layout, features = view.layout, view.features
    if len(layout.other_concepts) == 0:
        return MISSING
    mine = layout.forget_images
    return view.mean(metrics.mean_cosines(features.images[mine], features.concepts[layout.other_concepts]), mine)


def text_side(view: View) -> Estimate:
    """Mean cosine of other images (those that show no forget concept) with the forget concepts' captions.

    Forget concepts weigh the same; None where every image shows one.
    """
    layout, features = view.layout, view.features
    rest = layout.other_images
    return view.mean(metrics.mean_cosines(features.images[rest], features.concepts[layout.forget_concepts]), rest)


def other(view: View) -> dict[str, Estimate]:
    """Zero-shot accuracy on other data sets: "other:NAME" for each, classes weighted equally, and "other", their mean.

    No score without such data.
    """
    found = {}
    for name, (images, classes, labels) in view.features.other.items():
        correct = metrics.wrong_before_right(images, classes, np.arange(len(images)), labels) == 0
        found[f"other:{name}"] = stratified_mean(correct, labels, seed=view.seed)
    return {"other": mean_estimate(list(found.values())), **found} if found else {}


def held_out(view: View) -> dict[str, Estimate]:
    """Mean cosine of held-out pairs, each image with its own captions, mean over images.

    intra_identity: of `holdouts["association"]`, other facts of the entities that forget pairs are about.
    inter_identity: of `holdouts["identity"]`, facts of other entities.
    association_separability: see `association_separability`. No score without holdouts.
    """
    found = {}
    for name, score in (("association", "intra_identity"), ("identity", "inter_identity")):
        if name in view.features.holdouts:
            found[score] = stratified_mean(metrics.own_cosines(*view.features.holdouts[name]), seed=view.seed)
    return found


def visual_identity(view: View) -> dict[str, Estimate]:
    """Whether portraits of one entity still find each other, by image features alone.

    visual_identity: share of portraits whose nearest other portrait, by cosine, shows the same entity; the mean over
        the entities of the mean over an entity's portraits, of entities with at least two. Portraits are the test
        images, those of held-out pairs included, without images of general classes. No score without entities.
    """
    layout, features = view.layout, view.features
    if layout.entities is None:
        return {}
    shown = np.arange(len(layout.entities)) if layout.general is None else np.flatnonzero(~layout.general)
    parts = [(features.images[shown], layout.entities[shown])]
    parts += [(features.holdouts[name][0], held) for name, held in layout.holdout_entities.items()]
    images, entities = torch.cat([part for part, _ in parts]), np.concatenate([held for _, held in parts])
    _, number, counts = np.unique(entities, return_inverse=True, return_counts=True)
    asked = np.flatnonzero(counts[number] > 1)
    if len(asked) == 0:
        return {"visual_identity": missing("no entity has two test images")}
    groups = [np.flatnonzero(number == entity) for entity in np.unique(number[asked])]
    matching = np.concatenate([np.array([(i, j) for i in group for j in group if i != j]) for group in groups])
    ahead = metrics.wrong_before_right(images, images, matching[:, 0], matching[:, 1])[asked]
    # The portrait itself, which does not match itself, is always one of those ahead.
    return {"visual_identity": stratified_mean(ahead <= 1, number[asked], seed=view.seed)}


def general(view: View) -> dict[str, Estimate]:
    """Zero-shot accuracy on general pairs.

    general: share of retain images of the kind "general" nearer to their own class than to every other class of this
        kind, classes weighted equally. No score without such images.
    """
    layout = view.layout
    if layout.general is None or not (layout.general & ~layout.forget).any():
        return {}
    images = np.flatnonzero(layout.general & ~layout.forget)
    return {"general": view.mean(view.correct[images], images)}


def association_separability(view: View) -> Estimate:
    """How well a threshold on the cosine tells forget pairs from shuffled ones (`metrics.separability`): 0.5 not at
    all, 1 always.

    The pairs are those of forget images and their captions; a shuffled pair takes the caption of another forget pair
    that the image does not carry, nor any image of the same entity. None where all forget images share their captions.
    """
    layout, features = view.layout, view.features
    among = layout.forget[layout.caption_image_of]
    image_of, caption_of = layout.caption_image_of[among], layout.caption_of[among]
    width = len(features.captions)
    owner = image_of if layout.entities is None else layout.entities[image_of]
    own = np.unique(owner * width + caption_of)
    rng = np.random.default_rng(view.seed)
    for _ in range(20):  # draws again what came out as a true pair
        drawn = rng.permutation(caption_of)
        wrong = ~np.isin(owner * width + drawn, own)
        if wrong.all():
            break
    images = features.images[image_of]
    true, shuffled = ((images * features.captions[of]).sum(1).double().numpy() for of in (caption_of, drawn))
    value = metrics.separability(true, shuffled[wrong])
    return missing("all forget images share their captions") if value is None else Estimate(value)


def membership(view: View) -> dict[str, Estimate]:
    """Telling forget training pairs from forget test pairs by the cosine of image and own captions.

    The cosine is the mean over 4 augmented views of the image (see `augmented_views`).
    membership: area under the ROC curve, training pairs being the positives; 0.5 is chance.
    membership_tpr@1%: the share of training pairs found at 1 % false positives; None with fewer than 1,000 test pairs.
    """
    training, test = view.features.training_cosines, view.features.test_cosines
    if training is None or test is None:
        return {"membership": missing("no forget pair is held out"), "membership_tpr@1%": MISSING}
    rate = missing(f"needs at least {FEWEST_NEGATIVES} forget test pairs; there are {len(test)}")
    if len(test) >= FEWEST_NEGATIVES:
        rate = Estimate(metrics.true_positive_rate(training, test, 0.01))
    return {"membership": auc_estimate(training, test, seed=view.seed), "membership_tpr@1%": rate}


def unusual(view: View) -> Estimate:
    """Area under the ROC curve of telling forget images from images of concepts that were never trained (`other`).

    An image's score is minus its highest cosine with the captions of all concepts, and forget images are the positives.
    0.5: forget images look like images of unknown concepts; near 0: they are still familiar; near 1: unlearning has
    marked them. None without other data sets.
    """
    features = view.features
    if not features.other:
        return missing("needs other= with images of concepts that were never trained")
    unknown = torch.cat([images for images, _, _ in features.other.values()])
    forget = -metrics.largest_cosines(features.images[view.layout.forget_images], features.concepts)
    return auc_estimate(forget, -metrics.largest_cosines(unknown, features.concepts), seed=view.seed)


def _own(view: View, images: np.ndarray) -> np.ndarray:
    """Return the mean cosine of each of these images with its own concepts' captions; float64."""
    pairs = view.layout.pairs_among(images)
    return metrics.own_cosines(view.features.images[images], view.features.concepts, *pairs)


def _correct(layout: Layout, images: Tensor, concepts: Tensor, members: np.ndarray | None = None) -> np.ndarray:
    """Return whether each image is nearer to its concept than to all others of its kind.

    members: which images of the layout these are, ascending; None for all.
    """
    pairs = (layout.image_of, layout.concept_of) if members is None else layout.pairs_among(members)
    return metrics.wrong_before_right(images, concepts, *pairs, item_kinds=layout.kinds) == 0


Score = Callable[[View], "Estimate | dict[str, Estimate]"]

# A function that returns one estimate gives the score of its own name.
GROUPS: dict[str, tuple[Score, ...]] = {
    "forgetting": (association, mrr, zero_shot_top1, recall, paraphrase_top1),
    "collateral": (
        retain_top1,
        retain_association,
        worst_class_drop,
        neighbours_top1,
        image_side,
        text_side,
        other,
        held_out,
        visual_identity,
        general,
    ),
    "depth": (membership, unusual),
}


def score_features(view: View) -> dict[str, dict[str, Estimate]]:
    """Compute every score that needs features only, by group and name."""
    groups: dict[str, dict[str, Estimate]] = {}
    for group, functions in GROUPS.items():
        found = groups[group] = {}
        for function in functions:
            result = function(view)
            found.update(result if isinstance(result, dict) else {function.__name__: result})
    if view.features.holdouts:
        groups["forgetting"]["association_separability"] = association_separability(view)
    return groups
