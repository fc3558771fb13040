"""transformers' Trainer with the fused loss: a mixin, and the rest as ever."""

import tempfile

import open_clip
import torch
from transformers import Trainer, TrainingArguments

import cliperase_fast as cf
from cliperase_fast.data import open_source
from cliperase_fast.demo import RECIPES, cached_small_clip
from cliperase_fast.integrations.transformers import FusedLossMixin


class ClipTrainer(FusedLossMixin, Trainer):
    pass


folder = f"local-dir:{cached_small_clip('demo', RECIPES['demo'])}"
original, _, transform = open_clip.create_model_and_transforms(folder)
tokenize = open_clip.get_tokenizer(folder)
model = cf.export.to_transformers(original)  # or CLIPModel.from_pretrained(...)
pairs = open_source("demo").train
data = [{"pixel_values": transform(pairs.image(i)), "input_ids": tokenize(pairs.captions[i][0])[0]} for i in range(512)]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


options = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=64, max_steps=16, learning_rate=1e-4, logging_steps=4, report_to=[],
    save_strategy="no", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = ClipTrainer(model, options, train_dataset=data, eval_dataset=data[:128], data_collator=collate)
trainer.train()
print("loss on a part:", round(trainer.evaluate()["eval_loss"], 3))
