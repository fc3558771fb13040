"""Pictures of a text-to-image pipeline before and after: a painter of flat colours, and a tiny Stable Diffusion."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parents[1] / "report"))
from page_reader import Reader
from tiny_models import pixels_for, tiny_clip, tiny_pipeline, word_tokenizer

from cliperase_fast import InputError, UnlearningError, cli, export
from cliperase_fast.evaluation.generation import FORGET, Judge, _paired, compare_generation
from cliperase_fast.report.generation import generation_page, generation_text

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9)}
VALUES = torch.tensor(list(COLOURS.values()))
JUDGE = Judge(lambda images: -(images.mean((2, 3))[:, None] - VALUES).square().sum(-1), tuple(COLOURS))
FORGOTTEN = {"a red": "red"}
KEPT = {"others": {"a green": "green", "a blue": "blue"}}


class Words(nn.Module):
    """A text encoder: a colour for each word."""

    def __init__(self, values=VALUES, **config):
        super().__init__()
        self.colours = nn.Parameter(values.clone())
        sizes = {"hidden_size": 3, "vocab_size": 3, "max_position_embeddings": 2}
        self.config = SimpleNamespace(**{**sizes, **config})


class Pipeline:
    """Paint a flat colour with noise of the picture's own generator. hides: words for which a checker paints black."""

    def __init__(self, hides=(), noise=0.05):
        self.text_encoder, self.hides, self.noise = Words(), hides, noise
        self.calls = []

    def __call__(self, prompt, generator, output_type, strength=1.0):
        assert output_type == "np" and not self.text_encoder.training and not torch.is_grad_enabled()
        self.calls.append(len(prompt))
        rows = [list(COLOURS).index(each.split()[-1]) for each in prompt]
        colours = strength * self.text_encoder.colours[rows].float()[:, None, None]  # [B, 1, 1, 3]
        images = colours + self.noise * torch.stack([torch.randn(4, 4, 3, generator=each) for each in generator])
        flags = [any(word in each for word in self.hides) for each in prompt]
        images[flags] = 0
        return SimpleNamespace(images=images.clamp(0, 1).numpy(), nsfw_content_detected=flags)


def without_red():
    return Words(torch.stack([VALUES[1], *VALUES[1:]]))


def compare(pipeline=None, after=None, **options):
    arguments = {"judge": JUDGE, "forget": FORGOTTEN, "neighbours": KEPT, "images": 4, **options}
    return compare_generation(pipeline or Pipeline(), after or without_red(), **arguments)


def test_a_concept_that_the_encoder_lost_is_no_longer_seen_and_the_others_are():
    pipeline = Pipeline()
    own = pipeline.text_encoder.train()
    found = compare(pipeline).content
    shares = {name: of["concept"] for name, of in found["groups"].items()}
    assert (shares[FORGET]["before"]["value"], shares[FORGET]["after"]["value"]) == (1.0, 0.0)
    assert shares[FORGET]["change"]["high"] < -0.3 and shares[FORGET]["lost"] == 4
    others = found["groups"]["others"]
    assert others["asked"]["after"]["value"] == 1.0 and others["pictures"] == others["identical"] == 8
    assert others["pixel_change"] == 0.0 and found["groups"][FORGET]["pixel_change"] > 0.3
    assert others["concept"]["after"]["value"] == 0.0
    assert pipeline.text_encoder is own and own.training
    assert [row["class"] for row in found["prompts"]] == ["red", "green", "blue"]
    json.dumps(found, allow_nan=False)


def test_pictures_depend_on_neither_the_batch_nor_torchs_defaults():
    large = compare(batch_size=64)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        small = compare(batch_size=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one.after, other.after) for one, other in zip(large.painted, small.painted, strict=True))
    again = compare(seeds=np.array([3, 1]))
    assert json.loads(json.dumps(again.content["seeds"])) == [3, 1]
    assert torch.equal(again.painted[0].before, large.painted[0].before[[3, 1]])


def test_an_encoder_of_another_dtype_is_copied_and_left_as_it_was():
    pipeline, after = Pipeline(), without_red()
    pipeline.text_encoder.bfloat16()
    found = compare(pipeline, after)
    assert after.colours.dtype == torch.float32 and found.content["groups"][FORGET]["concept"]["after"]["value"] == 0


def test_earlier_pictures_are_used_again_for_another_encoder():
    pipeline = Pipeline()
    first = compare(pipeline)
    count = len(pipeline.calls)
    second = compare(pipeline, Words(), painted_before=first)
    assert len(pipeline.calls) == count + count // 2
    assert second.content["groups"][FORGET]["identical"] == 4
    with pytest.raises(InputError, match="other prompts, seeds or options"):
        compare(pipeline, painted_before=first, images=5)


def test_the_pipelines_encoder_returns_after_an_error():
    pipeline, after = Pipeline(), without_red()
    own, after.colours.data = pipeline.text_encoder, after.colours.data * float("nan")
    with pytest.raises(UnlearningError, match="not finite"):
        compare(pipeline, after)
    assert pipeline.text_encoder is own


def test_hidden_pictures_are_named_and_not_judged():
    found = compare(Pipeline(hides=["blue"])).content
    assert (found["groups"]["others"]["pictures"], found["groups"]["others"]["blocked"]) == (4, 4)
    assert "4 of 12 pairs of pictures contain a black picture" in found["notes"][0]
    with pytest.raises(UnlearningError, match="safety_checker=None"):
        compare(Pipeline(hides=["red"]))


def test_only_a_named_encoder_of_two_is_replaced():
    pipeline = Pipeline()
    pipeline.text_encoder_2 = Words()
    with pytest.raises(InputError, match="text_encoder, text_encoder_2: name one"):
        compare(pipeline)
    found = compare(pipeline, encoder="text_encoder_2")
    assert found.content["groups"][FORGET]["identical"] == 4  # the painter reads the first one
    with pytest.raises(InputError, match="not a text encoder of the Pipeline"):
        compare(pipeline, encoder="text_encoder_3")


def test_wrong_input_is_refused_before_anything_is_painted():
    projecting = Words()
    projecting.text_projection = nn.Linear(3, 3)
    with_projection = Pipeline()
    with_projection.text_encoder = projecting
    for message, wrong in {
        "a Words without a text encoder": {"pipeline": Words()},
        "hidden size 4, but that of the pipeline has 3": {"after": Words(hidden_size=4)},
        "vocabulary 9": {"after": Words(vocab_size=9)},
        "not a text model of transformers": {"after": nn.Linear(3, 3)},
        "projection=True": {"pipeline": with_projection},
        "'forget' has no prompts": {"forget": {}},
        "'others' has no prompts": {"neighbours": {"others": {}}},
        "cannot name 'pink': its classes are red, green, blue": {"forget": {"a pink": "pink"}},
        "asks for a class of the concept": {"concept": ["blue"]},
        "seeds has 2 twice": {"seeds": [2, 1, 2]},
        "seeds has 1.5: give whole numbers": {"seeds": [1.5]},
        "seeds has 36893488147419103232: give whole numbers of at most 64 bits": {"seeds": [2**65]},
        "seeds=3 must be a list": {"seeds": 3},
        "images=0 must be a whole number of at least 1": {"images": 0},
        "must not set prompt": {"options": {"prompt": "a red"}},
        "cannot be called with size=": {"options": {"size": 8}},
    }.items():
        pipeline = wrong.pop("pipeline", Pipeline())
        with pytest.raises(InputError, match=message):
            compare(pipeline, **wrong)
        assert not getattr(pipeline, "calls", None)
    with pytest.raises(InputError, match="two different classes"):
        Judge(JUDGE.score, ("red",))
    with pytest.raises(InputError, match=r"scores \[8, 3\] for 8 pictures and 2 classes"):
        compare(judge=Judge(JUDGE.score, ("red", "green")), neighbours={"green": {"a green": "green"}})


def test_the_interval_of_a_paired_change_is_newcombes():
    """Without correlation it is that of two samples; his table has 0.1705 to 0.8090 for 9 of 10 and 3 of 10."""
    before = np.array([True] * 9 + [False])
    after = np.array([True] * 3 + [False] * 7)
    found = _paired(before, after)
    assert found["change"]["value"] == pytest.approx(-0.6)
    assert (found["change"]["low"], found["change"]["high"]) == pytest.approx((-0.8090, -0.1705), abs=1e-4)
    assert (found["lost"], found["gained"]) == (6, 0)
    many = _paired(before.repeat(10), after.repeat(10))  # correlated, so the interval is narrower
    of_two_samples = math.hypot(
        many["after"]["high"] - many["after"]["value"], many["before"]["value"] - many["before"]["low"]
    )
    assert 0 < many["change"]["high"] - many["change"]["value"] < of_two_samples - 0.001
    same = _paired(before, before)["change"]
    assert same["low"] < same["value"] == 0.0 < same["high"]


def test_the_page_shows_each_pair_and_escapes_prompts():
    found = compare(forget={"<b>the</b> red": "red"})
    page = generation_page(found)
    assert page.count("data:image/png") == 2 * 3 * 4 and "&lt;b&gt;the&lt;/b&gt;" in page and "<b>the" not in page
    assert page.count('class="lost"') == 4 and "red → green" in page
    assert not Reader(page).open
    text = generation_text(found.content)
    assert "100.0% showed it before and 0.0% show it after" in text
    assert "No picture of the concept changed" in generation_text(compare(after=Words()).content)


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(max_position_embeddings=8)


@pytest.fixture(scope="module")
def diffusion(clip):
    return tiny_pipeline(export.to_diffusers_text_encoder(clip), word_tokenizer(model_max_length=8))


def changed(clip):
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.text_model.embeddings.token_embedding.weight[7] += 3  # "cat"
    return other


def paint(pipeline, after, guidance=100.0, **options):
    judge = Judge(lambda images: images.mean((2, 3))[:, :2], ("cat", "dog"))
    settings = {"num_inference_steps": 2, "guidance_scale": guidance}
    return compare_generation(
        pipeline, after, judge, {"a cat": "cat"}, {"dog": {"a dog": "dog"}}, images=3, options=settings, **options
    )


def test_stable_diffusion_paints_with_another_encoder_in_training_mode_too(clip, diffusion):
    own = diffusion.text_encoder
    after = export.to_diffusers_text_encoder(changed(clip))
    diffusion.unet.train()
    found = paint(diffusion, after)
    assert found.content["groups"][FORGET]["identical"] < 3 == found.content["groups"]["dog"]["identical"]
    assert found.painted[0].before.shape == (3, 3, 16, 16) and found.painted[0].before.float().std() > 1
    assert diffusion.text_encoder is own and diffusion.unet.training and not hasattr(diffusion, "_progress_bar_config")
    batch, single = (paint(diffusion, after, guidance=3.0, batch_size=size) for size in (6, 1))
    for one, other in zip(batch.painted, single.painted, strict=True):
        assert (one.after.int() - other.after.int()).abs().max() <= 1  # a level of rounding


def test_stable_diffusion_paints_in_half_precision(clip, diffusion):
    half = copy.deepcopy(diffusion).to(torch.bfloat16)
    found = paint(half, export.to_diffusers_text_encoder(changed(clip)))
    assert found.content["groups"][FORGET]["identical"] < 3 == found.content["groups"]["dog"]["identical"]


def test_the_command_compares_saved_pipelines_and_models(clip, diffusion, tmp_path, capsys, monkeypatch):
    from cliperase_fast.models import load_model

    def loaded(model, **options):
        kept = {"before": clip, "after": changed(clip)}
        shape = pixels_for(clip).shape[1:]
        return load_model(
            kept[model],
            tokenizer=word_tokenizer(),
            transform=lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).reshape(shape) / 255,
        )

    monkeypatch.setattr("cliperase_fast.models.load_model", loaded)
    monkeypatch.setattr("cliperase_fast.evaluation.generation.load_model", loaded)
    diffusion.save_pretrained(tmp_path / "pipeline")
    capsys.readouterr()  # what importing libraries printed
    page = tmp_path / "page.html"
    words = ["generate", "--pipeline", str(tmp_path / "pipeline"), "--after", "after", "--judge", "before"]
    words += ["--forget", "cat", "--neighbour", "dog", "--template", "a {}", "--images", "2", "--steps", "2"]
    words += ["--guidance", "100"]
    words += ["--device", "cpu", "--quiet"]
    assert cli.main([*words, "--json", "--output", str(page)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["concept"] == ["cat"] and content["groups"]["dog"]["identical"] == 2
    assert content["groups"][FORGET]["identical"] < 2 and page.read_text().count("data:image/png") == 2 * 2 * 2
    words[2] = str(tmp_path)
    assert cli.main(words) == 2
    assert "has no model_index.json" in capsys.readouterr().err


def test_the_command_refuses_a_class_that_is_both_forgotten_and_kept(capsys):
    words = ["generate", "--pipeline", "p", "--after", "a", "--judge", "b", "--forget", "cat", "--neighbour", "dog"]
    assert cli.main([*words, "--neighbour", "cat"]) == 2
    told = capsys.readouterr().err
    assert told == "cliperase-fast: 'cat' is given with --forget and with --neighbour: name it once\n"
