"""Choose the arithmetic of the encoders for `precision="auto"`: bfloat16 if it is fast and hardly changes the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor, linalg

from cliperase_fast.coercion import AUTO
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset
from cliperase_fast.data.drawing import seeded
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import EncodedPairs, closeness, encode_pairs, score
from cliperase_fast.models import ClipAdapter
from cliperase_fast.models.runtime import has_fast_bfloat16
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.splits import Split

FEATURES = 0.05  # largest distance of a feature in bf16 from that in float32; both have length 1
SCORES = 0.01  # largest difference of a score; the association counts by `closeness`
PAIRS = 256  # compared at most
_COMPARED = ("zero_shot_top1", "image_to_text_r@1", "association")


@dataclass(frozen=True)
class Precision:
    """The arithmetic of the encoders. used: fp32, bf16 or fp16. reason: why; empty unless `auto` chose it."""

    requested: str
    used: str
    reason: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    def notes(self) -> list[str]:
        """Return a note for the result if `auto` chose."""
        return [f"precision='auto' chose {self.used}: {self.reason}"] if self.reason else []


def choose_precision(settings: UnlearnConfig, adapter: ClipAdapter, part: Split, runtime: Runtime) -> Precision:
    """Return what `settings.precision` stands for, the same on every rank; all ranks call it together.

    bf16 if every rank's device has fast bfloat16 and `adapter` has nearly the same features and scores in it, on a
    sample of `part`. runtime: in float32.
    """
    if settings.precision != AUTO:
        return Precision(settings.precision, settings.precision)
    ranks, device = runtime.ranks, runtime.device
    if not all(ranks.gather_results(lambda: has_fast_bfloat16(device))):
        what = "GPU" if device.type == "cuda" else "processor"
        return Precision(AUTO, "fp32", f"the {what} has no fast bfloat16 arithmetic")
    pairs = _sample(part, settings.seed)
    complaint, found = ranks.run_on_first(lambda: _compare(adapter, pairs, runtime))
    return Precision(AUTO, "fp32" if complaint else "bf16", complaint or found)


def _sample(part: Split, seed: int) -> PairDataset:
    """Return at most `PAIRS` pairs, forget and retain pairs in the split's proportion."""
    drawn = np.random.default_rng([seed, PAIRS]).permutation(len(part.pairs))[:PAIRS]
    return part.pairs.subset(np.sort(drawn))


def _compare(adapter: ClipAdapter, pairs: PairDataset, runtime: Runtime) -> tuple[str, str]:
    """Return why bf16 will not do, empty if it will, and what was found."""

    @seeded(0, gpus=False)  # so that a random transform draws the same views twice
    def encode(precision: str) -> EncodedPairs:
        return encode_pairs(adapter, pairs, batch_size=runtime.batch_size, device=runtime.device, precision=precision)

    exact = encode("fp32")
    try:
        half = encode("bf16")
    except InputError as error:
        return f"the model does not run in bf16 ({error})", ""
    distance = max(_distance(exact.image_features, half.image_features),
                   _distance(exact.caption_features, half.caption_features))  # fmt: skip
    if not distance <= FEATURES:
        return f"features in bf16 are up to {distance:.3f} away from those in float32, more than {FEATURES:g}", ""
    scores = [score(encoded, pairs, device=runtime.device)["all"] for encoded in (exact, half)]
    near = closeness(float(adapter.logit_scale().detach()))
    for name in _COMPARED:
        before, after = (of[name] for of in scores)
        most = SCORES / near if name == "association" else SCORES
        if before is not None and (after is None or abs(before - after) > most):
            return f"{name} is {before:.3f} in float32 and {after:.3f} in bf16, more than {most:.2g} apart", ""
    return "", (
        f"the device has fast bfloat16 arithmetic, and on {len(pairs)} validation pairs features differ by at most "
        f"{distance:.3f} from float32 and scores by at most {SCORES:g}"
    )


def _distance(exact: Tensor, other: Tensor) -> float:
    """Return the largest distance of two rows; NaN if there is one."""
    return float(linalg.vector_norm(exact - other, dim=-1).max()) if len(exact) else 0.0
