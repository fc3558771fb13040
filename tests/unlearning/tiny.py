"""Tiny models and data that the tests here (and the processes they start) share."""

from contextlib import contextmanager

import open_clip
import torch
from torch import nn

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


class TwoTowers(nn.Module):
    """A CLIP of two layers. image, text: what is done to the features of images and of texts."""

    def __init__(self, image=lambda features: features, text=lambda features: features, scale=2.0, vocabulary=128):
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(3 * 8 * 8, 8)
        self.text = nn.Embedding(vocabulary, 8)
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        self.change = image, text

    def encode_image(self, pixels):
        return self.change[0](self.visual(pixels.flatten(1)))

    def encode_text(self, tokens):
        return self.change[1](self.text(tokens).mean(1))


def tokenize(captions):
    """Token ids for `TwoTowers`: the letters."""
    return torch.tensor([[ord(letter) for letter in caption.ljust(16)[:16]] for caption in captions])


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


@contextmanager
def interrupted_after(done):
    """Interrupt the training in this block after `done` steps."""
    import pytest  # here, as processes that import this module need neither

    from cliperase_fast.unlearning.trainer import Trainer

    whole = Trainer._step

    def step(trainer, number, batches):
        if number == done:
            raise KeyboardInterrupt
        return whole(trainer, number, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", step)
        yield
