"""Run CLIPErase in a plain PyTorch loop: forget the digit seven.

Needs: no extra.
"""

import copy

import open_clip
import torch
import torch.nn.functional as F

import cliperase_fast as cf
from cliperase_fast.data import open_source, select
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS

folder = f"local-dir:{cached_small_clip('demo', DEMO_MODELS['demo'])}"
model, _, transform = open_clip.create_model_and_transforms(folder)
tokenize = open_clip.get_tokenizer(folder)
pairs = open_source("demo").train
is_seven = select(pairs, "class:seven")  # bool [n]


def batches(part, size):
    data = [(transform(image), tokenize(caption)[0]) for image, caption in part]
    return torch.utils.data.DataLoader(data, batch_size=size, shuffle=True, drop_last=True)


def features(model, images, texts):
    return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(texts), dim=-1)


def accuracy():
    scores = cf.evaluate(model, "demo", forget="class:seven", tokenizer=tokenize, transform=transform, progress=False)
    return {part: f"{scores[part]['zero_shot_top1']:.0%}" for part in ("forget", "retain")}


torch.manual_seed(0)
forget_batches = batches(pairs.subset(is_seven), 16)
retain_batches = batches(pairs.subset(~is_seven), 64)
print("zero-shot accuracy on the test digits before:", accuracy())

# The recipe itself
teacher = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
loss_of = cf.CLIPEraseLoss(lambda_retain=1.0, lambda_forget=3.0, lambda_consistency=3.0)
for epoch in range(4):
    for forget, retain in zip(forget_batches, retain_batches, strict=False):
        with torch.no_grad():
            frozen = features(teacher, *retain)
        scales = model.logit_scale.exp(), teacher.logit_scale.exp()
        terms = loss_of(*features(model, *forget), *features(model, *retain), *frozen, *scales)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    print(epoch, {name: round(float(value.detach()), 3) for name, value in terms._asdict().items()})
print("zero-shot accuracy on the test digits after:", accuracy())
