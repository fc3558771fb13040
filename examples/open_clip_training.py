"""open_clip's own trainer, unchanged, twice: trained further with the fused loss, then made to forget the digit seven.

The first is also a command: cliperase-fast train-open-clip -- --train-data ... --model ...
"""

import tempfile
from pathlib import Path

from open_clip_train.main import main as train

import cliperase_fast as cf
from cliperase_fast.data import open_source
from cliperase_fast.demo import RECIPES, cached_small_clip
from cliperase_fast.integrations.open_clip_unlearning import unlearning

model = cached_small_clip("demo", RECIPES["demo"])
work = Path(tempfile.mkdtemp())
pairs = open_source("demo").train
lines = {"forget": ["filepath\ttitle"], "retain": ["filepath\ttitle"]}
for index in range(0, len(pairs), 3):
    pairs.image(index).save(work / f"{index}.png")
    caption = pairs.captions[index][0]
    lines["forget" if "seven" in caption else "retain"].append(f"{work / str(index)}.png\t{caption}")
for name, rows in lines.items():
    (work / f"{name}.csv").write_text("\n".join(rows))

arguments = [
    "--model", f"local-dir:{model}", "--train-data", str(work / "retain.csv"), "--dataset-type", "csv",
    "--batch-size", "64", "--epochs", "1", "--lr", "1e-4", "--warmup", "2", "--workers", "0", "--device", "cpu",
    "--precision", "fp32", "--logs", str(work),
]  # fmt: skip

with cf.patch_open_clip():
    train([*arguments, "--name", "trained-further"])

teacher = ["--distill-model", f"local-dir:{model}", "--distill-pretrained", str(model / "open_clip_model.safetensors")]
with unlearning(str(work / "forget.csv"), 16, cf.CLIPEraseLoss()):
    train([*arguments, *teacher, "--name", "without-seven"])
print("checkpoints:", *sorted(str(path.relative_to(work)) for path in work.glob("*/checkpoints/*.pt")))
