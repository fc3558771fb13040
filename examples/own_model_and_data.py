"""Any two-tower module and any (image, caption) pairs: here random towers and flat colours."""

import torch

import cliperase_fast as cf

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
WORDS = ["a", "square", *COLOURS]


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(3 * 8 * 8, 16)
        self.text = torch.nn.EmbeddingBag(len(WORDS), 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))  # the log of the scale, as in CLIP

    def encode_image(self, pixels):
        return self.visual(pixels.flatten(1))

    def encode_text(self, tokens):
        return self.text(tokens)


def tokenize(captions):
    return torch.tensor([[WORDS.index(word) for word in caption.split()] for caption in captions])


def pairs(*colours):
    return [
        (torch.tensor(COLOURS[c])[:, None, None] + 0.2 * torch.randn(3, 8, 8), f"a {c} square") for c in colours * 20
    ]


torch.manual_seed(0)
result = cf.unlearn(
    TwoTowers(),
    pairs("red"),
    pairs("green", "blue"),
    tokenizer=tokenize,
    epochs=20,
    learning_rate=1e-2,
    retain_floor=1.0,
)
print(result.summary())
