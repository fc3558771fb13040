"""Tiny models and data that the tests here (and the processes they start) share."""

import open_clip
import torch

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


def make_tiny_clip(seed=0, logit_bias=None, **vision):
    """A CLIP of a few thousand parameters beside the token table, with random weights. logit_bias: of a SigLIP."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16, **vision},
            text_cfg={"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            init_logit_bias=logit_bias,
        ).eval()


def make_pairs(per_colour=12, seed=0):
    """(image tensor [3, 8, 8], caption) pairs: noisy flat colours."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.tensor(value)[:, None, None] + 0.3 * torch.randn(3, 8, 8, generator=generator), f"a {colour} square")
        for colour, value in COLOURS.items()
        for _ in range(per_colour)
    ]


def split_pairs(pairs, colour):
    return [p for p in pairs if colour in p[1]], [p for p in pairs if colour not in p[1]]


QUICK = {"method": "cliperase", "epochs": 2, "batch_size": 6, "learning_rate": 1e-3, "progress": False, "report": False}
