"""Use your own two-tower module and (image, caption) pairs: the towers learn six colours, then forget red.

Needs: no extra.
"""

import torch
import torch.nn.functional as F

import cliperase_fast as cf

COLOURS = {
    "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0), "purple": (1.0, 0.0, 1.0), "cyan": (0.0, 1.0, 1.0),
}  # fmt: skip
WORDS = ["a", "square", *COLOURS]


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(3 * 8 * 8, 16)
        self.text = torch.nn.EmbeddingBag(len(WORDS), 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))  # the log of the scale, as in CLIP

    def encode_image(self, pixels):
        return self.visual(pixels.flatten(1) - 0.5)

    def encode_text(self, tokens):
        return self.text(tokens)


def tokenize(captions):
    return torch.tensor([[WORDS.index(word) for word in caption.split()] for caption in captions])


def pairs(*colours):
    return [
        (torch.tensor(COLOURS[c])[:, None, None] + 0.2 * torch.randn(3, 8, 8), f"a {c} square") for c in colours * 20
    ]


torch.manual_seed(0)
model = TwoTowers()
forget, retain = pairs("red"), pairs(*list(COLOURS)[1:])

images = torch.stack([image for image, _ in forget + retain])
tokens = tokenize([caption for _, caption in forget + retain])
same_caption = tokens[:, 1]  # the colour: pairs of one caption are not each other's negatives
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(100):
    features = [F.normalize(part, dim=-1) for part in (model.encode_image(images), model.encode_text(tokens))]
    loss = cf.functional.clip_loss(*features, model.logit_scale.exp(), group_ids=same_caption)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"Two towers have learned {', '.join(COLOURS)} (loss {loss.item():.3f}). Now they forget red.")

result = cf.unlearn(model, forget, retain, tokenizer=tokenize)
print(result.summary())
