"""Training from kept activations: each image goes through the frozen layers once, and nothing else changes."""

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast.models import load_model
from cliperase_fast.models.adapters.base import ClipAdapter
from cliperase_fast.unlearning.engines.local import LocalEngine
from cliperase_fast.unlearning.evaluator import Evaluator


@pytest.fixture
def embedded(monkeypatch):
    """How many images have gone through the first layers with the model in training mode."""
    counts, embed = [], VisionTransformer._embeds

    def counting(self, x):
        counts.append(len(x) if self.training else 0)
        return embed(self, x)

    monkeypatch.setattr(VisionTransformer, "_embeds", counting)
    return counts


def run(pairs=None, **changes):
    forget, retain = split_pairs(pairs or make_pairs(), "red")
    return cf.unlearn(make_tiny_clip(), forget, retain, **{**QUICK, "epochs": 4, "epoch_over": "retain", **changes})


@pytest.mark.parametrize("changes", [{}, {"grad_cache_chunk": 3}, {"num_workers": 1}], ids=["", "chunks", "workers"])
@pytest.mark.parametrize("trainable", ["last:1", "text"])
def test_each_image_passes_the_frozen_layers_once(trainable, changes, embedded):
    expected = run(trainable=trainable, **changes, image_cache_mib=0)
    every_epoch = sum(embedded)
    embedded.clear()
    found = run(trainable=trainable, **changes)
    assert 0 < sum(embedded) < 0.6 * every_epoch
    losses = [[line["total"] for line in result.history if "total" in line] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    # Not the weights: a key's bias has no gradient but rounding, which Adam makes steps of.
    inputs = torch.randn(4, 3, 8, 8), load_model(found.model).tokenize(["a red square", "a blue square"])
    with torch.no_grad():
        for encode, given in zip(("encode_image", "encode_text"), inputs, strict=True):
            one, other = (getattr(result.model, encode)(given) for result in (found, expected))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trainable", ["last:1", "text", "image"])
def test_evaluations_reuse_what_is_not_trained_and_give_the_same_bits(trainable, monkeypatch):
    images, encode = [], ClipAdapter.encode_image
    texts, encode_text = [], ClipAdapter.encode_text
    monkeypatch.setattr(ClipAdapter, "encode_image", lambda *given: images.append(1) or encode(*given))
    monkeypatch.setattr(ClipAdapter, "encode_text", lambda *given: texts.append(1) or encode_text(*given))
    found, counts = run(trainable=trainable), (len(images), len(texts))
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "reuse", lambda *given, **named: None)
        expected = run(trainable=trainable)
    assert found.history[-1]["validation"] == expected.history[-1]["validation"]
    assert found.after == expected.after
    fewer = len(images) - 2 * counts[0], len(texts) - 2 * counts[1]
    # Of four evaluations, only the first encodes images; where they are not trained at all, once more for the front.
    assert fewer == {"last:1": (3, 0), "text": (2, 0), "image": (0, 3)}[trainable]


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, embedded):
    changes = {"trainable": "last:1", "checkpoint_every": 3}
    whole = run(**changes, output_dir=tmp_path / "whole")
    one_run = sum(embedded)
    step, done = LocalEngine.step, []

    def interrupted(engine, rate):
        done.append(rate)
        if len(done) == 5:
            raise KeyboardInterrupt
        return step(engine, rate)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalEngine, "step", interrupted)
        run(**changes, output_dir=tmp_path / "run")
    embedded.clear()
    resumed = run(**changes, output_dir=tmp_path / "run", resume=True)
    assert sum(embedded) == one_run, "each image once, and what is tried to find out"
    assert [line["step"] for line in resumed.history] == [line["step"] for line in whole.history]
    for (name, tensor), expected in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(),
                                        strict=True):  # fmt: skip
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    "changes",
    [{"image_cache_mib": 0}, {"teacher_cache": "off"}, {"epochs": 1}, {"trainable": "all"}],
    ids=["no room", "teacher reads the images", "one pass", "all trained"],
)
def test_activations_are_not_kept_where_they_would_not_help(changes, embedded):
    result = run(**{"trainable": "last:1", **changes})
    steps = sum("total" in line for line in result.history)
    tried = 5 if "image_cache_mib" in changes else 1 + int("trainable" in changes)  # times one image, to find out
    assert sum(embedded) == steps * (result.config.forget_pairs + result.config.retain_pairs) + tried


def test_redrawn_images_are_read_each_time(embedded):
    pairs = [(Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)), f"a {colour} square")
             for i in range(12) for colour in ("red", "blue")]  # fmt: skip

    def jitter(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 + torch.randn(3, 1, 1)

    result = run(pairs, trainable="last:1", lambda_consistency=0, transform=jitter)
    steps = sum("total" in line for line in result.history)
    assert sum(embedded) == steps * (result.config.forget_pairs + result.config.retain_pairs) + 1  # to find out
