"""Use transformers' Trainer with the fused loss, by a mixin. A CLIPModel learns the captions of digits.

Needs: pip install '.[transformers]', and accelerate, which transformers' Trainer requires.
"""

from cliperase_fast.extras import exit_without

exit_without("transformers")

import tempfile

import open_clip
import torch
from transformers import Trainer, TrainingArguments

import cliperase_fast as cf
from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.integrations.transformers import FusedLossMixin


class ClipTrainer(FusedLossMixin, Trainer):
    pass


folder = f"local-dir:{cached_small_clip('demo', DEMO_MODELS['demo'])}"
original, _, transform = open_clip.create_model_and_transforms(folder)
tokenize = open_clip.get_tokenizer(folder)
torch.manual_seed(0)
model = cf.export.to_transformers(original)  # a CLIPModel; or CLIPModel.from_pretrained(...)
torch.nn.init.normal_(model.text_projection.weight, std=0.1)  # something to learn: its texts mean nothing at first


def pairs(part, count):
    return [
        {"pixel_values": transform(part.image(i)), "input_ids": tokenize(part.captions[i][0])[0]} for i in range(count)
    ]


def collate(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


digits = open_source("demo")
options = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=64, per_device_eval_batch_size=64, max_steps=40, learning_rate=1e-3,
    logging_steps=10, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = ClipTrainer(
    model, options, train_dataset=pairs(digits.train, 512), eval_dataset=pairs(digits.test, 128), data_collator=collate
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"contrastive loss of the same 128 test pairs, in batches of 64: {before:.3f} before, {after:.3f} after 40 steps")
