"""Run open_clip's unchanged trainer twice: continue training with the fused loss, then forget the digit seven.

The first is also a command: cliperase-fast train-open-clip -- --train-data ... --model ...

Needs: pip install '.[open-clip-training]'
"""

from cliperase_fast.extras import exit_without

exit_without("open-clip-training")

import tempfile
from pathlib import Path

import open_clip
import torch
from open_clip_train.main import main as train

import cliperase_fast as cf
from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.integrations.open_clip_unlearning import unlearning

folder = cached_small_clip("demo", DEMO_MODELS["demo"])
work = Path(tempfile.mkdtemp())
pairs = open_source("demo").train
lines = {"forget": ["filepath\ttitle"], "retain": ["filepath\ttitle"]}
for index in range(len(pairs)):
    pairs.image(index).save(work / f"{index}.png")
    caption = pairs.captions[index][0]
    lines["forget" if "seven" in caption else "retain"].append(f"{work / str(index)}.png\t{caption}")
for name, rows in lines.items():
    (work / f"{name}.csv").write_text("\n".join(rows))

arguments = [
    "--model", f"local-dir:{folder}", "--train-data", str(work / "retain.csv"), "--dataset-type", "csv",
    "--batch-size", "64", "--epochs", "2", "--lr", "1e-4", "--warmup", "2", "--workers", "0", "--device", "cpu",
    "--precision", "fp32", "--logs", str(work),
]  # fmt: skip


def accuracy(run=None):
    """Of the original, or of what a run saved, on the test digits."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    if run is not None:
        saved = torch.load(work / run / "checkpoints" / "epoch_2.pt", weights_only=True)
        model.load_state_dict(saved["state_dict"])
    options = {"tokenizer": open_clip.get_tokenizer(f"local-dir:{folder}"), "transform": transform}
    scores = cf.evaluate(model, "demo", forget="class:seven", progress=False, **options)
    return {part: f"{scores[part]['zero_shot_top1']:.0%}" for part in ("forget", "retain")}


with cf.patch_open_clip():
    train([*arguments, "--name", "trained-further"])

start = str(folder / "open_clip_model.safetensors")
teacher = ["--distill-model", f"local-dir:{folder}", "--distill-pretrained", start]
with unlearning(str(work / "forget.csv"), 16, cf.CLIPEraseLoss()):
    train([*arguments, *teacher, "--name", "without-seven"])

print("checkpoints in", work)
print("zero-shot accuracy on the test digits, forget (seven) and retain (the others):")
for run in (None, "trained-further", "without-seven"):
    print(f"  {run or 'original'}: {accuracy(run)}")
