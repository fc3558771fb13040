"""A small model that has learned three colours, and pairs of it, that the tests here share."""

import copy
import sys
from functools import lru_cache
from pathlib import Path

import open_clip
import torch

from cliperase_fast import functional
from cliperase_fast.models import load_model

sys.path.append(str(Path(__file__).parents[1] / "models"))  # for tiny_models

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "grey": (0.2, 0.2, 0.2)}
SYNONYMS = {"red": ["crimson"]}


def make_pairs(per_colour=12, seed=0, colours=COLOURS):
    """(image tensor [3, 8, 8], caption) pairs: noisy flat colours."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.tensor(COLOURS[colour])[:, None, None] + 0.5 * torch.randn(3, 8, 8, generator=generator),
            f"a {colour} square",
        )
        for colour in colours
        for _ in range(per_colour)
    ]


def training_and_test():
    """(forget, retain, (forget test, retain test)), red being forgotten."""
    training, test = make_pairs(), make_pairs(8, seed=1)
    (forget, retain), tests = (
        ([p for p in pairs if "red" in p[1]], [p for p in pairs if "red" not in p[1]]) for pairs in (training, test)
    )
    return forget, retain, tests


@lru_cache
def _trained(colours, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
            text_cfg={"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        )
        adapter = load_model(model)
        pairs = make_pairs(24, seed=2, colours=colours)
        pixels = torch.stack([image for image, _ in pairs])
        tokens, groups = adapter.tokenize([caption for _, caption in pairs]), [caption for _, caption in pairs]
        ids = torch.tensor([sorted(set(groups)).index(group) for group in groups])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            images, texts = adapter.encode_image(pixels), adapter.encode_text(tokens)
            loss = functional.clip_loss(images, texts, adapter.logit_scale(), group_ids=ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def make_model(colours=tuple(COLOURS), seed=0):
    """A CLIP trained on these colours; an oracle where "red" is not among them."""
    return copy.deepcopy(_trained(tuple(colours), seed))


def without_red(seed=0):
    return make_model([colour for colour in COLOURS if colour != "red"], seed)
