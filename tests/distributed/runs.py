"""`unlearn()` on a tiny CLIP and flat colours, as the tests run it on one process and on ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("unlearning", "models")]
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast.unlearning.engines.base import Engine

# 5 forget and 6 retain pairs a batch: no rank count divides both.
SETTINGS = {**QUICK, "batch_size": 11, "forget_fraction": 0.45, "epochs": 3, "evaluate_every": 2}
TERMS = ("total", "retain", "forget", "consistency")


# Adam's first step is lr * g / (|g| + eps). Where g is 0 but for rounding (of captions that still have the original's
# features, of the biases of keys), a weight moves by the whole rate to a side that rounding chooses, and ranks round
# other sums than one process. With an eps above rounding, runs that add the same numbers in another order agree.
EPS_ABOVE_ROUNDING = 1e-2


@contextmanager
def adam_above_rounding() -> Iterator[None]:
    """Within, runs have Adam with `EPS_ABOVE_ROUNDING`."""
    make_optimizer = Engine.make_optimizer

    def make(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*arguments, **options)
        for group in optimizer.param_groups:
            group["eps"] = EPS_ABOVE_ROUNDING
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "make_optimizer", make)
        yield


def run(**changes: Any) -> cf.UnlearnResult:
    """rename: parts of captions, and what takes their place."""
    pairs, clip = make_pairs(per_colour=18), changes.pop("clip", {})
    for part, other in changes.pop("rename", {}).items():
        pairs = [(image, caption.replace(part, other)) for image, caption in pairs]
    forget, retain = split_pairs(pairs, "red")
    with adam_above_rounding():
        return cf.unlearn(make_tiny_clip(**clip), forget, retain, **{**SETTINGS, **changes})


def told(result: cf.UnlearnResult, features: bool = True) -> dict[str, Any]:
    """Return the results of a run in types that can be sent between processes."""
    return {
        "losses": [[line[name] for name in TERMS if name in line] for line in result.history if "total" in line],
        "norms": [line["grad_norm"] for line in result.history if "total" in line],
        "rates": [line.get("rank_pairs_per_second") for line in result.history if "total" in line],
        "scores": {part: result.record["after"][part] for part in ("forget", "retain")},
        "selection": result.selection,
        "features": features_of(result.model) if features else None,
    }


def features_of(model: torch.nn.Module) -> np.ndarray:
    """Of a few images: what the weights compute, whatever they are."""
    pixels = torch.stack([image for image, _ in make_pairs(per_colour=2, seed=5)])
    with torch.no_grad():
        return torch.nn.functional.normalize(model.eval().encode_image(pixels), dim=-1).numpy()


def run_here(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    return told(run(**changes))


def run_half(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A run of the same model in bfloat16."""
    forget, retain = split_pairs(make_pairs(per_colour=18), "red")
    model = make_tiny_clip().bfloat16()
    result = cf.unlearn(model, forget, retain, **{**SETTINGS, "epochs": 1, "learning_rate": 3e-3, **changes})
    shares = [line["weights_changed"] for line in result.history if "weights_changed" in line]
    return {**told(result, features=False), "weights": result.record["weights"], "shares": shares}


def run_below_the_resolution(rank: int, deepspeed: str) -> str:
    try:
        run(learning_rate=1e-20, deepspeed=deepspeed)
    except cf.UnlearningError as error:
        return str(error)
    return "it ran"


class Fatal(torch.utils.data.Dataset):
    """The pairs of a colour; once its `left` images are read after `armed`, this process is killed."""

    left: int | None = None

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        if Fatal.left is not None:
            Fatal.left -= 1
            if Fatal.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.pairs[index]


def run_fatally(output: Path | str, reads: int | None, **changes: Any) -> cf.UnlearnResult:
    """A run in which this process is killed when it has read `reads` images of forget pairs; None: it is not."""
    Fatal.left = reads
    forget, retain = split_pairs(make_pairs(per_colour=18), "red")
    return cf.unlearn(make_tiny_clip(), Fatal(forget), retain, output_dir=output, **{**SETTINGS, **changes})


def noisy(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 + 0.2 * torch.randn(3, 1, 1)


def run_with_random_views(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (Image.fromarray(((image.permute(1, 2, 0).numpy() + 2) * 60).clip(0, 255).astype(np.uint8)), caption)
        for image, caption in make_pairs()
    ]
    forget, retain = split_pairs(rows, "red")
    return told(cf.unlearn(make_tiny_clip(), forget, retain, transform=noisy, **{**SETTINGS, "epochs": 1, **changes}))


def run_on_digits(rank: int, cache: Path, deepspeed: str) -> dict[str, Any]:
    """A run on the demo's data."""
    from cliperase_fast.demo import cached_small_clip
    from cliperase_fast.demo_models import DEMO_MODELS

    recipe = DEMO_MODELS["demo"]
    model = f"local-dir:{cached_small_clip('demo', recipe, cache_dir=cache)}"
    settings = {"epochs": 10, "batch_size": 64, "learning_rate": 1e-4, "deepspeed": deepspeed, "report": False}
    result = cf.unlearn(model, "demo#class:seven", "rest", progress=False, **settings)
    return told(result, features=False)


def run_kind(rank: int, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A run of a small model of that kind, with captions that are token ids."""
    from tiny_models import MODELS, pixels_for

    torch.manual_seed(0)  # not every kind is seeded
    model = MODELS[kind]()
    # Each kind reads images of its own size.
    pairs = [
        (pixels + i % 3, torch.tensor([8, 1 + i % 3, 4 + i % 2, 9] + 12 * [0]))
        for i, pixels in enumerate(pixels_for(model, 48))
    ]
    forget, retain = [p for p in pairs if p[1][1] == 1], [p for p in pairs if p[1][1] != 1]
    settings = {**SETTINGS, "epochs": 1, **changes}
    return told(cf.unlearn(model, forget, retain, test=(forget, retain), **settings), features=False)
