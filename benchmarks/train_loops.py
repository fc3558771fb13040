"""Two ways to unlearn, for benchmarks.train: a straightforward loop and `unlearn()`, on the same batches.

python -m benchmarks.train_loops SETTING WHO FOLDER QUICK        one run in this process; prints JSON

The straightforward loop is written as a re-implementation of CLIPErase would be: student and teacher in memory; forget,
retain and teacher encoded separately; a caption encoded for each pair and padded to the context; materialised logits
with cross_entropy and kl_div; float32; plain torch.optim.Adam; the loss read in each step; images transformed in the
main process.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import PairDataset, open_source, select
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS
from cliperase_fast.models import load_model, set_trainable
from cliperase_fast.unlearning import api
from cliperase_fast.unlearning.methods import base as methods_base
from cliperase_fast.unlearning.preparation import make_plan
from cliperase_fast.unlearning.splits import Split, open_sets, prepare_data
from cliperase_fast.unlearning.trainer import Trainer

from .machine import resident

WHO = ("straightforward", "unlearn")
PHASES = (
    "data",
    "image encoder, forward",
    "text encoder, forward",
    "teacher",
    "loss, forward",
    "loss, backward",
    "text encoder, backward",
    "image encoder, backward",
    "optimizer",
    "other",
)


@dataclass(frozen=True)
class Setting:
    """A model with its data and settings; `title` for people."""

    title: str
    model: Callable[[Path, bool], str]  # (folder for files, quick) -> a model string for `unlearn()`
    sets: Callable[[bool], dict[str, Any]]  # (quick) -> forget, retain, test
    config: dict[str, Any]
    rounds: int  # runs of each kind
    quick: dict[str, Any]  # what --quick changes in the config


def _demo_model(folder: Path, quick: bool) -> str:
    recipe = replace(DEMO_MODELS["demo"], epochs=5) if quick else DEMO_MODELS["demo"]
    return f"local-dir:{cached_small_clip('demo', recipe, cache_dir=folder)}"


def _demo_sets(quick: bool) -> dict[str, Any]:
    return {"forget": "demo#class:seven", "retain": "rest", "test": None}


def _vit_model(folder: Path, quick: bool) -> str:
    """ViT-B-32 with random weights, the same in every run."""
    path = folder / "vit-b-32-random.pt"
    if not path.is_file():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("ViT-B-32").state_dict(), path)
    return f"ViT-B-32:{path}"


def _small_vit_model(folder: Path, quick: bool) -> str:
    """A vision transformer of 6 layers of width 256 at 96 pixels, with random weights, the same in every run."""
    path = folder / "small-vit"
    if not path.is_dir():
        torch.manual_seed(0)
        tower = {"layers": 6, "width": 256}
        model = open_clip.model.CLIP(
            embed_dim=256,
            vision_cfg={"image_size": 96, "patch_size": 16, "head_width": 64, **tower},
            text_cfg={"heads": 4, **tower},
        )
        preprocessing = open_clip.transform.PreprocessCfg(size=96, mean=(0.5,) * 3, std=(0.25,) * 3)
        open_clip.model.set_model_preprocess_cfg(model, asdict(preprocessing))
        load_model(model).save(path)
    return f"local-dir:{path}"


def _vit_sets(quick: bool) -> dict[str, Any]:
    """Rendered shapes: red ones are forgotten, blue ones kept; captions like "a red circle"."""
    each, tests = (4, 1) if quick else (8, 2)
    source = open_source(f"shapes?train={each}&test={tests}")
    assert source.test is not None
    chosen = [
        part.subset(np.flatnonzero(select(part, f"caption:{colour}")))
        for part in (source.train, source.test)
        for colour in ("red", "blue")
    ]
    return {"forget": chosen[0], "retain": chosen[1], "test": (chosen[2], chosen[3])}


# The losses of both loops are the same sums: no pair is left out of the denominators.
_SHARED = {"false_negatives": "none", "select": "last", "checkpoint_every": 10**9, "report": False}
SETTINGS = {
    "demo": Setting(
        "demo model, digits, batch 64",
        _demo_model,
        _demo_sets,
        {**_SHARED, "batch_size": 64, "learning_rate": 1e-4, "epochs": 60, "evaluate_every": 20},
        rounds=2,
        quick={"epochs": 10, "evaluate_every": 10},
    ),
    "small-vit": Setting(
        "ViT of 6 layers of width 256, random weights, shapes at 96 x 96, batch 64",
        _small_vit_model,
        _vit_sets,
        {**_SHARED, "batch_size": 64, "learning_rate": 1e-5, "epochs": 3, "evaluate_every": 1},
        rounds=1,
        quick={"epochs": 1, "batch_size": 16},
    ),
    "vit-b-32": Setting(
        "open_clip ViT-B-32, random weights, shapes at 224 x 224, batch 64",
        _vit_model,
        _vit_sets,
        {**_SHARED, "batch_size": 64, "learning_rate": 1e-5, "epochs": 2, "evaluate_every": 2, "eval_batch_size": 64},
        rounds=1,
        quick={"epochs": 1, "batch_size": 16, "eval_batch_size": 16},
    ),
}
_vit = SETTINGS["vit-b-32"]
SETTINGS["vit-b-32-last"] = replace(
    _vit,
    title=f"{_vit.title}, the last block of each tower trained",
    config={**_vit.config, "trainable": "last:1", "epochs": 4, "evaluate_every": 4},
    quick={**_vit.quick, "epochs": 3},
)


class Timeline:
    """Charges the time since the last mark to a phase of the step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: dict[str, float] = {}
        self._last = self._began = time.perf_counter()
        self._backward = "other"

    def begin(self) -> None:
        self._open = dict.fromkeys(PHASES, 0.0)
        self._last = self._began = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        if self._open:
            self._open[phase] += now - self._last
        self._last = now

    def close(self) -> None:
        """A step ends; the next begins with `begin`."""
        self.mark("other")
        self.steps.append({**self._open, "step": self._last - self._began})
        self._open = {}

    def watch(self, tensor: Tensor, phase: str) -> Tensor:
        """From where the backward pass reaches `tensor`, its time is `phase`'s."""
        if tensor.requires_grad:

            def reached(gradient: Tensor) -> None:
                self.mark(self._backward)
                self._backward = phase

            tensor.register_hook(reached)
        return tensor

    def watch_loss(self, total: Tensor) -> None:
        def begins(gradient: Tensor) -> None:
            self.mark("other")
            self._backward = "loss, backward"
            torch.autograd.Variable._execution_engine.queue_callback(ends)

        def ends() -> None:
            self.mark(self._backward)
            self._backward = "other"

        total.register_hook(begins)


def straightforward(
    model: str, sets: dict[str, Any], config: UnlearnConfig, timeline: Timeline
) -> tuple[dict[str, Any], list[float]]:
    """(scores before and after, total loss of each step)."""
    data = prepare_data(open_sets(**sets, config=config, templates=None), config, progress=False)
    arch, _, weights = model.partition(":")
    if arch == "local-dir":
        student, _, transform = open_clip.create_model_and_transforms(model)
        tokenize = open_clip.get_tokenizer(model)
    else:
        student, _, transform = open_clip.create_model_and_transforms(arch, pretrained=weights)
        tokenize = open_clip.get_tokenizer(arch)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)

    def scores(part: Split) -> dict[str, float]:
        return _accuracies(student, tokenize, transform, part, config.eval_batch_size)

    before, _ = scores(data.test), scores(data.validation)
    parameters = list(student.parameters())
    if config.trainable != "all":
        parameters = [parameter for _, parameter in set_trainable(load_model(student), config.trainable)]
    optimizer = torch.optim.Adam(parameters, lr=float(config.learning_rate))
    losses: list[float] = []
    plan = make_plan(config, data.train)
    per_epoch = plan.batches_per_epoch
    for epoch in range(int(config.epochs)):
        student.train()
        for number in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            timeline.begin()
            forget, retain = plan.batch(number)
            forget_pixels, forget_tokens = _load(data.train.pairs, forget, epoch, transform, tokenize)
            retain_pixels, retain_tokens = _load(
                data.train.pairs, data.train.n_forget + retain, epoch, transform, tokenize
            )
            timeline.mark("data")
            optimizer.zero_grad()
            forget_image = timeline.watch(
                student.encode_image(forget_pixels, normalize=True), "image encoder, backward"
            )
            retain_image = timeline.watch(
                student.encode_image(retain_pixels, normalize=True), "image encoder, backward"
            )
            timeline.mark("image encoder, forward")
            forget_text = timeline.watch(student.encode_text(forget_tokens, normalize=True), "text encoder, backward")
            retain_text = timeline.watch(student.encode_text(retain_tokens, normalize=True), "text encoder, backward")
            timeline.mark("text encoder, forward")
            with torch.no_grad():
                teacher_image = teacher.encode_image(retain_pixels, normalize=True)
                teacher_text = teacher.encode_text(retain_tokens, normalize=True)
            timeline.mark("teacher")
            logits = student.logit_scale.exp() * retain_image @ retain_text.T  # [N, N]
            teacher_logits = teacher.logit_scale.exp() * teacher_image @ teacher_text.T  # [N, N]
            labels = torch.arange(len(logits))
            retention = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            forgetting = F.cosine_similarity(forget_image, forget_text).mean()
            consistency = sum(
                F.kl_div(F.log_softmax(a, dim=1), F.softmax(b, dim=1), reduction="batchmean")
                for a, b in ((logits, teacher_logits), (logits.T, teacher_logits.T))
            )
            loss = (
                config.lambda_retain * retention
                + config.lambda_forget * forgetting
                + config.lambda_consistency * consistency
            )
            timeline.mark("loss, forward")
            timeline.watch_loss(loss)
            loss.backward()
            timeline.mark("other")
            optimizer.step()
            timeline.mark("optimizer")
            losses.append(loss.item())
            timeline.close()
        if (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs:
            scores(data.validation)
    return {"before": before, "after": scores(data.test)}, losses


def _load(pairs: PairDataset, indices: np.ndarray, epoch: int, transform: Any, tokenize: Any) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and tokens [B, L]; an image with several captions shows another one in every epoch."""
    pixels = torch.stack([transform(pairs.image(int(index))) for index in indices])
    captions = [pairs.captions[index] for index in indices]
    return pixels, tokenize([own[(index + epoch) % len(own)] for index, own in zip(indices, captions, strict=True)])


@torch.no_grad()
def _accuracies(student: Any, tokenize: Any, transform: Any, part: Split, batch: int) -> dict[str, float]:
    """Zero-shot accuracy of the forget and of the retain pairs."""
    student.eval()
    pairs = part.pairs
    assert pairs.prompts is not None and pairs.labels is not None
    prompts = [student.encode_text(tokenize(list(of_class)), normalize=True).mean(0) for of_class in pairs.prompts]
    classes = F.normalize(torch.stack(prompts), dim=1)  # [C, D]
    found = []
    for start in range(0, len(pairs), batch):
        images = [transform(pairs.image(index)) for index in range(start, min(start + batch, len(pairs)))]
        found.append((student.encode_image(torch.stack(images), normalize=True) @ classes.T).argmax(1))
    right = torch.cat(found).numpy() == pairs.labels
    return {"forget": float(right[: part.n_forget].mean()), "retain": float(right[part.n_forget :].mean())}


def with_unlearn(
    model: str, sets: dict[str, Any], config: UnlearnConfig, timeline: Timeline
) -> tuple[dict[str, Any], list[float]]:
    """As `straightforward`."""

    class Timed(Trainer):
        def __init__(self, *parts: Any, **named: Any) -> None:
            super().__init__(*parts, **named)
            _instrument(self, timeline)

    with mock.patch.object(methods_base, "Trainer", Timed):
        result = api.unlearn(model, **sets, config=config, progress=False)
    scores = {
        when: {part: getattr(result, when)[part]["zero_shot_top1"] for part in ("forget", "retain")}
        for when in ("before", "after")
    }
    return scores, [line["total"] for line in result.history if "total" in line]


def _instrument(trainer: Any, timeline: Timeline) -> None:
    """Marks around what the trainer calls. A step goes from the request for a batch to the return of `_step`."""
    engine, loader, teacher, step = trainer.engine, trainer.loader, trainer.teacher, trainer._step
    batches = loader.batches

    def timed_batches(start: int, stop: int) -> Iterator[Any]:
        source = batches(start, stop)
        for _ in range(start, stop):
            timeline.begin()
            batch = next(source)
            timeline.mark("data")
            yield batch

    def timed_step(*given: Any) -> Any:
        result = step(*given)
        timeline.close()
        return result

    def timed(function: Callable[..., Any], phase: str, backward: str | None = None) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            timeline.mark("other")
            output = function(*arguments)
            timeline.mark(phase)
            return output if backward is None else timeline.watch(output, backward)

        return call

    trainer._step, loader.batches = timed_step, timed_batches
    engine._encode_image = timed(engine._encode_image, "image encoder, forward", "image encoder, backward")
    engine._encode_text = timed(engine._encode_text, "text encoder, forward", "text encoder, backward")
    if teacher is not None:
        teacher.features = timed(teacher.features, "teacher")

    objective = trainer.objective

    def timed_objective(features: Any) -> Any:
        timeline.mark("other")
        terms = objective(features)
        timeline.mark("loss, forward")
        timeline.watch_loss(terms.total)
        return terms

    trainer.objective = timed_objective
    engine.optimizer.register_step_pre_hook(lambda *_: timeline.mark("other"))
    engine.optimizer.register_step_post_hook(lambda *_: timeline.mark("optimizer"))


def run(setting: Setting, who: str, folder: Path, quick: bool) -> dict[str, Any]:
    """One run in this process: seconds, memory, scores."""
    config = UnlearnConfig.from_dict({"method": "cliperase", **setting.config, **(setting.quick if quick else {})})
    model, sets, timeline = setting.model(folder, quick), setting.sets(quick), Timeline()
    loop = {"straightforward": straightforward, "unlearn": with_unlearn}[who]
    held = resident("VmRSS")
    began = time.perf_counter()
    scores, losses = loop(model, sets, config, timeline)
    steps = timeline.steps[1:]  # the first one warms up
    return {
        "who": who,
        "seconds": round(time.perf_counter() - began, 3),
        "pairs": config.batch_size,
        "step_seconds": [round(step["step"], 6) for step in steps],
        "phases": {phase: round(statistics.fmean(step[phase] for step in steps), 6) for phase in PHASES},
        "held_bytes": held,
        "peak_bytes": resident("VmHWM"),
        "scores": scores,
        "losses": [round(loss, 6) for loss in losses],
    }


def main() -> None:
    name, who, folder, quick = sys.argv[1:]
    print(json.dumps(run(SETTINGS[name], who, Path(folder), quick == "quick")))


if __name__ == "__main__":
    main()
