"""The table of the audit's scores: what the page, the text table, the gap and the docs know about each.

The exact definitions are the docstrings of `cliperase_fast.auditing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cliperase_fast.evaluation.metrics import COSINE, HIGHER, LOWER, SHARE, Format

AREA = Format(1, 3, "")  # areas under a curve and reciprocal ranks, from 0 to 1
POINTS = Format(100, 1, "")  # a difference of shares, in percentage points


@dataclass(frozen=True)
class Score:
    """A score of an audit.

    label: its name for people. meaning: its definition in one line, a phrase without a full stop.
    format: how it is written.
    better: "lower" or "higher", what unlearning aims at; "" where only the distance to the oracles counts.
    in_mean: whether the mean gap is over this score and the others that are in it.
    """

    label: str
    meaning: str
    format: Format = SHARE
    better: str = ""
    in_mean: bool = False

    def about(self, what: str) -> Score:
        """This score of a family, `what` standing for "{}"."""
        return replace(self, label=self.label.replace("{}", what), meaning=self.meaning.replace("{}", what))


# A name that ends with "@" or ":" is a family of scores: "relearn@" is also about "relearn@5", and "{}" is the 5.
SCORES: dict[str, Score] = {
    # forgetting
    "association": Score(
        "Association", "mean cosine of forget images with their own captions, from −1 to 1", COSINE, LOWER, in_mean=True
    ),
    "mrr": Score("Reciprocal rank", "mean of the next two", AREA, LOWER),
    "mrr_image_to_text": Score(
        "Reciprocal rank, image to text",
        "mean over forget images of 1 / rank of the right caption among those of all concepts",
        AREA,
        LOWER,
    ),
    "mrr_text_to_image": Score(
        "Reciprocal rank, text to image",
        "mean over forget captions of 1 / rank of the best right image among all test images",
        AREA,
        LOWER,
    ),
    "zero_shot_top1": Score(
        "Zero-shot accuracy", "share of forget images whose nearest class is their own", SHARE, LOWER
    ),
    "image_to_text_r@": Score(
        "Image to text, R@{}", "share of forget images with one of their captions among the {} nearest", SHARE, LOWER
    ),
    "text_to_image_r@": Score(
        "Text to image, R@{}",
        "share of captions of forget images with an image that carries them among the {} nearest",
        SHARE,
        LOWER,
    ),
    "paraphrase_top1": Score(
        "Accuracy under other names",
        "zero-shot accuracy under other templates, synonyms, plurals and hypernyms, mean over them",
        SHARE,
        LOWER,
    ),
    "paraphrase_top1_max": Score(
        "Accuracy, best other name", "the same under the name that finds the most forget images", SHARE, LOWER
    ),
    "association_separability": Score(
        "Separability of pairs",
        "balanced accuracy of telling forget pairs from shuffled ones by their cosine; 50% is chance",
        SHARE,
        LOWER,
    ),
    # collateral
    "retain_top1": Score(
        "Retain accuracy",
        "share of retain images nearer to a caption of their own than to that of every other concept",
        SHARE,
        HIGHER,
        in_mean=True,
    ),
    "retain_association": Score(
        "Retain association", "mean cosine of retain images with their own captions", COSINE, HIGHER, in_mean=True
    ),
    "worst_class_drop": Score(
        "Largest loss of a class",
        "accuracy before minus accuracy after, in points, of the retain class that lost most",
        POINTS,
        LOWER,
    ),
    "neighbours_top1": Score(
        "Accuracy of neighbours",
        "retain accuracy of the 3 classes whose captions are nearest to a forget caption in the original",
        SHARE,
        HIGHER,
    ),
    "image_side": Score(
        "Forget images, other captions",
        "mean cosine of forget images with the captions of other concepts",
        COSINE,
        in_mean=True,
    ),
    "text_side": Score(
        "Other images, forget captions",
        "mean cosine of images of other concepts with the forget captions",
        COSINE,
        in_mean=True,
    ),
    "other": Score("Accuracy on other data", "zero-shot accuracy, mean over the other data sets", SHARE, HIGHER),
    "other:": Score("Accuracy on {}", "zero-shot accuracy on this other data set", SHARE, HIGHER),
    "intra_identity": Score(
        "Same entities, other facts",
        "mean cosine of held-out pairs about the entities that forget pairs are about",
        COSINE,
        HIGHER,
    ),
    "inter_identity": Score("Other entities", "mean cosine of held-out pairs about other entities", COSINE, HIGHER),
    "visual_identity": Score(
        "Visual identity", "share of portraits whose nearest other portrait shows the same entity", SHARE, HIGHER
    ),
    "general": Score(
        "Accuracy on general pairs",
        "retain accuracy on pairs about no entity, among classes of their kind",
        SHARE,
        HIGHER,
    ),
    # depth
    "membership": Score(
        "Membership",
        "probability that a forget training pair has a higher cosine than a forget test pair; 0.5 is chance",
        AREA,
        LOWER,
    ),
    "membership_tpr@1%": Score(
        "Membership, found",
        "share of forget training pairs told from test pairs by their cosine at 1% false positives",
        SHARE,
        LOWER,
    ),
    "unusual": Score(
        "Unusual images",
        "probability that a forget image is farther from every caption than one of a never-trained concept; 0.5: it "
        "looks like an unknown concept",
        AREA,
    ),
    "probe": Score(
        "Linear probe",
        "balanced accuracy of a linear probe, forget against rest, on features after its best block; 50% is chance",
        SHARE,
        LOWER,
    ),
    "relearn@": Score(
        "Relearning, step {}",
        "share of forget images named after so many steps of training on 16 forget pairs among 128 pairs in all",
        SHARE,
        LOWER,
    ),
    "relearn_area": Score("Relearning, mean", "mean of these shares over the numbers of steps", SHARE, LOWER),
    "relearn_area:": Score(
        "Relearning, {}",
        "the mean with fewer forget pairs, or with those of a neighbouring or an unrelated class instead",
        SHARE,
        LOWER,
    ),
    "prompt_attack": Score(
        "Soft prompt", "share of forget images named with 4 trained tokens in front of the caption", SHARE, LOWER
    ),
    "quantised_top1@": Score(
        "Rounded to {} bits",
        "zero-shot accuracy on forget images after all matrices are rounded to {} bits",
        SHARE,
        LOWER,
    ),
}


def find_score(name: str) -> Score:
    """The entry of a score's name. A score that the table does not know is written as a plain number."""
    if name in SCORES:
        return SCORES[name]
    family, what = _family(name)
    if family is not None:
        return SCORES[family].about(what)
    return Score(name.replace("_", " ").capitalize(), "", COSINE)


def meanings(names: Mapping[str, object]) -> list[tuple[str, str]]:
    """(label, meaning) of these scores, in their order; a family once, "…" standing for what its scores differ in."""
    found: dict[str, Score] = {}
    for name in names:
        family, _ = (None, "") if name in SCORES else _family(name)
        found.setdefault(family or name, SCORES[family].about("…") if family else find_score(name))
    return [(score.label, score.meaning) for score in found.values() if score.meaning]


def _family(name: str) -> tuple[str | None, str]:
    """The family of a score's name and what follows it; None for the name of no family."""
    for mark in "@:":
        stem, found, what = name.partition(mark)
        if found and stem + mark in SCORES:
            return stem + mark, what
    return None, ""
