"""SigLIP, ChineseCLIP, BLIP and open_clip's further architectures: features, unlearning, saving, resuming, audit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_families import FAMILIES, blip, blip_scores, siglip, siglip2
from tiny_models import word_tokenizer

from cliperase_fast import audit, unlearn
from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model
from cliperase_fast.unlearning import trainer

COLOURS = {"a red cat": (220, 30, 30), "a dog": (30, 60, 220), "a photo of a dog": (40, 200, 60)}
FORGET = "a red cat"
LEFT_ALONE = ("logit_bias", "itm_head")
LONG = partial(pytest.param, marks=pytest.mark.long)
# EVA's smallest tower takes images of 224 pixels.
ALL_BUT_EVA = [LONG(name) if "eva" in name else name for name in FAMILIES]
SOME_NOW = [name if name in ("siglip", "blip") else LONG(name) for name in FAMILIES]
SETTINGS = {"steps": 3, "batch_size": 6, "learning_rate": 1e-3, "progress": False, "report": False, "seed": 0}


def pairs(count: int = 4, noise_seed: int = 0) -> list[tuple[Image.Image, str]]:
    generator = torch.Generator().manual_seed(noise_seed)
    made = []
    for caption, colour in COLOURS.items():
        for _ in range(count):
            shade = torch.randint(0, 30, (20, 20, 3), generator=generator) + torch.tensor(colour)
            made.append((Image.fromarray(shade.clamp(max=255).to(torch.uint8).numpy()), caption))
    return made


def split() -> tuple[list[Any], list[Any]]:
    made = pairs()
    return [pair for pair in made if pair[1] == FORGET], [pair for pair in made if pair[1] != FORGET]


def tokenizer(name: str) -> Any:
    return None if name in ("open_clip siglip", "open_clip eva") else word_tokenizer()


def run(name: str, output: Path | None = None, **changes: Any) -> Any:
    return unlearn(
        FAMILIES[name].make(), *split(), tokenizer=tokenizer(name), output_dir=output, **{**SETTINGS, **changes}
    )


def own_features(name: str, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    family = FAMILIES[name]
    adapter = load_model(family.make(), tokenizer=tokenizer(name))
    pixels = torch.randn(3, 3, family.size, family.size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image, text = family.image(model, pixels), family.text(model, adapter.tokenize(list(COLOURS)))
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


@pytest.mark.parametrize("name", ALL_BUT_EVA)
def test_features_are_those_of_the_models_own_library(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    adapter = load_model(model, tokenizer=tokenizer(name))
    image, text = own_features(name, model)
    pixels = torch.randn(3, 3, family.size, family.size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_image(pixels), image, atol=2e-6, rtol=0)
        torch.testing.assert_close(adapter.encode_text(adapter.tokenize(list(COLOURS))), text, atol=2e-6, rtol=0)
    assert (adapter.logit_bias() is not None) == ("siglip" in name)


@pytest.mark.parametrize("name", SOME_NOW)
def test_a_run_goes_on_after_an_interruption_and_its_own_library_loads_the_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(name)
    step = trainer.Trainer.step

    def interrupted(self: Any, done: int, batches: Any) -> Any:
        if done == 2:
            raise KeyboardInterrupt
        return step(self, done, batches)

    monkeypatch.setattr(trainer.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(name, tmp_path / "run", checkpoint_every=1)
    monkeypatch.setattr(trainer.Trainer, "step", step)
    result = run(name, tmp_path / "run", checkpoint_every=1, resume=True)
    state = result.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in whole.model.state_dict().items())
    before = FAMILIES[name].make().state_dict()
    assert any(not torch.equal(state[key], value) for key, value in before.items())

    loaded = FAMILIES[name].load(tmp_path / "run" / "model")
    for found, expected in zip(own_features(name, loaded), own_features(name, result.model.eval()), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    left_alone = [key for key in before if key.startswith(LEFT_ALONE) or "crossattention" in key]
    assert bool(left_alone) == (name in ("siglip", "siglip2", "open_clip siglip", "blip"))
    assert all(torch.equal(state[key], before[key]) for key in left_alone)
    assert name == "blip" or not torch.equal(state["logit_scale"], before["logit_scale"])


@pytest.mark.parametrize("name", [LONG(name) if name != "blip" else name for name in FAMILIES])
def test_lora_trains_both_towers_and_the_audit_measures_the_result(name: str) -> None:
    result = run(name, trainable="lora", learning_rate=3e-2, steps=2)
    original = FAMILIES[name].make()
    adapter = load_model(original, tokenizer=tokenizer(name))
    before = original.state_dict()
    changed = {key for key, value in result.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {adapter.tower(key) for key in changed} == {"image", "text"}
    found = audit(original, result.model, *split(), tokenizer=tokenizer(name), progress=False)
    assert {"before", "after"} <= found.scores.keys()


@pytest.mark.parametrize("make", [siglip, siglip2])
def test_the_default_transform_is_siglips_at_the_models_size(make: Any, tmp_path: Path) -> None:
    adapter = load_model(make(), tokenizer=word_tokenizer())
    pixels = adapter.transform(Image.new("RGB", (40, 20), (255, 0, 127)))
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1, -1, 0], abs=0.01)
    adapter.save(tmp_path / "m")
    again = load_model(tmp_path / "m", tokenizer=word_tokenizer())
    assert again.kind == adapter.kind
    torch.testing.assert_close(again.transform(Image.new("RGB", (40, 20), (9, 99, 199))), adapter.transform(
        Image.new("RGB", (40, 20), (9, 99, 199))))  # fmt: skip


def test_siglips_captions_are_padded_to_the_whole_context_which_its_text_tower_reads() -> None:
    adapter = load_model(siglip(), tokenizer=word_tokenizer())
    tokens = adapter.tokenize(["a dog"])
    assert tokens.shape == (1, 12)
    with torch.no_grad():
        assert (adapter.encode_text(tokens) - adapter.encode_text(tokens[:, :6])).abs().max() > 1e-3


def test_blips_cosines_are_those_of_its_contrastive_heads() -> None:
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[8, 2, 5, 9, 0], [8, 6, 9, 0, 0]])
    adapter = load_model(blip(), tokenizer=word_tokenizer())
    with torch.no_grad():
        cosines = adapter.encode_image(pixels) @ adapter.encode_text(tokens).T
        torch.testing.assert_close(cosines, blip_scores(blip(), pixels, tokens), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "method",
    ["calibrated", "kl_minimization", *map(LONG, ("gradient_difference", "retain_finetune", "ssd", "multidelete"))],
)
def test_methods_without_softmaxes_of_their_own_work_on_the_sigmoid_loss(method: str) -> None:
    training = {} if method == "ssd" else {"steps": 2, "learning_rate": 1e-3}
    unlearn(siglip(), *split(), tokenizer=word_tokenizer(), method=method, batch_size=6, progress=False, report=False,
            **training)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "relabel"}, "method='relabel' is defined by softmaxes"),
        (
            {"method": "cliperase", "consistency": "intra"},
            "consistency='intra' is not defined for a model that was trained with the sigmoid",
        ),
        ({"backend": "native"}, "does not compute the bernoulli loss"),
        ({"teacher": blip()}, "one of the model and the teacher has a logit_bias"),
    ],
)
def test_what_is_not_defined_for_the_sigmoid_loss_is_refused_before_any_work(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        run("siglip", tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
