"""Unlearn in Lightning: forget the digit seven with a Trainer and two loaders.

Needs: pip install '.[lightning]'
"""

from cliperase_fast.extras import exit_without

exit_without("lightning")

import lightning
import open_clip
import torch
from torch.utils.data import DataLoader

import cliperase_fast as cf
from cliperase_fast.data import open_source, select
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.integrations.lightning import UnlearningModule

folder = f"local-dir:{cached_small_clip('demo', DEMO_MODELS['demo'])}"
model, _, transform = open_clip.create_model_and_transforms(folder)
tokenize = open_clip.get_tokenizer(folder)
pairs = open_source("demo").train
is_seven = select(pairs, "class:seven")  # bool [n]
forget, retain = (
    [(transform(image), tokenize(caption)[0]) for image, caption in pairs.subset(part)]
    for part in (is_seven, ~is_seven)
)


def accuracy():
    scores = cf.evaluate(model, "demo", forget="class:seven", tokenizer=tokenize, transform=transform, progress=False)
    return {part: f"{scores[part]['zero_shot_top1']:.0%}" for part in ("forget", "retain")}


lightning.seed_everything(0)
print("zero-shot accuracy on the test digits before:", accuracy())
trainer = lightning.Trainer(
    max_steps=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(
    UnlearningModule(model, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-4)),
    {"forget": DataLoader(forget, 16, shuffle=True), "retain": DataLoader(retain, 64, shuffle=True)},
)
print("losses of the last step:", {name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
print("zero-shot accuracy on the test digits after:", accuracy())
