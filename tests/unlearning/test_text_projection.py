"""`method="text_projection"`: an edit of the text projection from captions alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import make_pairs, make_tiny_clip, split_pairs
from torch import nn

import cliperase_fast as cf
from cliperase_fast import InputError, UnlearningError
from cliperase_fast.models import load_model
from cliperase_fast.unlearning.methods.text_projection import TextHead, TextProjection, ridge_projection

sys.path.append(str(Path(__file__).parents[1] / "auditing"))  # whose modules find those of tests/models
from small import make_model, training_and_test
from tiny_models import tiny_clip, tiny_hugging_face, tiny_open_clip

METHOD = "text_projection"
QUIET = {"method": METHOD, "progress": False, "report": False}


def unit_rows(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def projection_of(forget, retain, ridge=0.01):
    return ridge_projection(forget, retain.T @ retain / len(retain), retain.mean(0), ridge)


def test_the_projection_keeps_the_span_of_other_captions_and_removes_what_sets_forget_captions_apart():
    forget, retain = unit_rows(2, 8, 0), unit_rows(5, 8, 1)
    projection = projection_of(forget, retain)
    assert torch.allclose(projection @ projection, projection, atol=1e-9)
    assert torch.allclose(retain @ projection, torch.zeros_like(retain), atol=1e-7)
    kept = forget - forget @ projection
    assert torch.allclose(kept, retain.mean(0).expand_as(kept), atol=1e-7)


def test_where_other_captions_fill_the_width_a_smaller_ridge_moves_them_less():
    forget, retain = unit_rows(1, 4, 0), unit_rows(40, 4, 1) * torch.tensor([1.0, 1.0, 1.0, 0.05])
    moved = []
    for ridge in (10.0, 0.001):
        projection = projection_of(forget, F.normalize(retain, dim=1), ridge)
        assert torch.allclose(projection @ projection, projection, atol=1e-9)
        moved.append(float((F.normalize(retain, dim=1) @ projection).norm()))
    assert 0 < moved[1] < 0.8 * moved[0]


def test_directions_that_other_captions_span_cannot_be_removed():
    retain = unit_rows(3, 8, 1)
    assert projection_of(F.normalize(retain[:1] + retain[1:2], dim=1), retain) is None


def test_a_run_forgets_and_keeps_the_features_of_other_captions():
    forget, retain, test = training_and_test()
    model = make_model()
    result = cf.unlearn(model, forget, retain, test=test, **QUIET)
    before, after = load_model(model), load_model(result.model)
    tokens = before.tokenize(sorted({caption for _, caption in retain}))
    assert torch.allclose(before.encode_text(tokens), after.encode_text(tokens), atol=1e-6)
    assert result.before["forget"]["image_to_text_r@1"] == 1
    assert result.after["forget"]["image_to_text_r@1"] == 0
    original = model.state_dict()
    changed = [name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, original[name])]
    assert changed == ["text_projection"]


def test_a_finished_edit_is_not_repeated(tmp_path, monkeypatch):
    sets, settings = split_pairs(make_pairs(), "red"), {**QUIET, "output_dir": tmp_path / "run"}
    first = cf.unlearn(make_tiny_clip(), *sets, **settings)
    monkeypatch.setattr(TextProjection, "edit", None)
    again = cf.unlearn(make_tiny_clip(), *sets, **settings, resume=True)
    assert torch.equal(first.model.text_projection, again.model.text_projection)
    assert (again.after, again.selection, again.history) == (first.after, first.selection, first.history)


def test_less_is_removed_where_all_would_cost_more_than_the_floor(monkeypatch):
    """The rule of selection is replaced by one that only a strength up to 0.3 passes."""
    from cliperase_fast.unlearning.selection import Selection

    strengths = []
    write = TextHead.write

    def watched(head, weight):
        strengths.append(float((weight - start).norm()))
        write(head, weight)

    model = make_tiny_clip()
    start = model.text_projection.detach().clone()
    monkeypatch.setattr(TextHead, "write", watched)
    monkeypatch.setattr(Selection, "within", lambda rule, candidate: strengths[-1] <= 0.3 * strengths[0])
    cf.unlearn(model, *split_pairs(make_pairs(), "red"), **QUIET)
    shares = [strength / strengths[0] for strength in strengths]
    assert len(shares) == 10
    assert shares[:4] == pytest.approx([1, 0.5, 0.25, 0.375], rel=1e-3)
    assert max(share for share in shares if share <= 0.3) == pytest.approx(0.3, abs=0.002)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(tiny_open_clip, id="open_clip"),
        pytest.param(lambda: tiny_open_clip(custom_text=True, text_cfg={"proj_bias": True}), id="with a bias"),
        pytest.param(tiny_clip, id="transformers"),
        pytest.param(lambda: tiny_hugging_face(projection="linear"), id="a tower from transformers"),
    ],
)
def test_the_head_is_found_and_what_it_reads_gives_the_features(model):
    adapter = load_model(model())
    state = {name: tensor.clone() for name, tensor in adapter.module.state_dict().items()}
    probe = adapter.probe()
    assert probe is not None
    head = TextHead.of(adapter)
    head.check(adapter, probe[1])
    inputs = head.inputs(adapter, probe[1])
    head.write(torch.zeros_like(head.oriented(head.weight)))
    bias = getattr(head.owner, "bias", None)
    expected = torch.zeros_like(adapter.text_output(probe[1])) if bias is None else bias.expand(len(inputs), -1)
    assert torch.allclose(adapter.text_output(probe[1]), expected, atol=1e-6)
    head.oriented(head.weight).data.copy_(head.oriented(state[head.name]))
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.module.state_dict().items())


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: tiny_hugging_face(projection="mlp"), "text.proj.0.weight, text.proj.2.weight"),
        (lambda: tiny_hugging_face(projection=None), "none that its name tells"),
    ],
    ids=["two layers", "none"],
)
def test_a_text_head_that_is_not_one_matrix_is_refused_by_name(model, named):
    adapter = load_model(model())
    with pytest.raises(InputError, match=f"does not end in one .*{named}.*use another method"):
        TextHead.of(adapter)


class SquashedHead(nn.Module):
    """Two towers whose text features are a function of the projection's output other than its direction."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
        self.token_table = nn.Embedding(99, 5)
        self.text_projection = nn.Linear(5, 6)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return self.image_tower(pixels)

    def encode_text(self, tokens):
        return self.text_projection(self.token_table(tokens).mean(1)).tanh()


def test_a_head_with_more_behind_it_is_refused_before_anything_is_written(tmp_path):
    pairs = [(image, torch.tensor([1, 2 if "red" in caption else 3])) for image, caption in make_pairs()]
    forget, retain = pairs[:12], pairs[12:]
    with pytest.raises(InputError, match=r"SquashedHead does not end in one .*text_projection\.weight"):
        cf.unlearn(SquashedHead(), forget, retain, output_dir=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_forget_and_retain_pairs_with_the_same_captions_are_refused():
    pairs = [(image, "a square") for image, _ in make_pairs()]
    with pytest.raises(InputError, match="have the same 1 captions: choose a method that reads images"):
        cf.unlearn(make_tiny_clip(), pairs[:12], pairs[12:], **QUIET)


def test_captions_that_cannot_be_told_apart_end_the_run_with_a_reason(monkeypatch):
    monkeypatch.setattr("cliperase_fast.unlearning.methods.text_projection.ridge_projection", lambda *given: None)
    with pytest.raises(UnlearningError, match="the 2 other captions span the directions of the 1 forget captions"):
        cf.unlearn(make_tiny_clip(), *split_pairs(make_pairs(), "red"), **QUIET)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"method_options": {"ridge": 0}}, "ridge=0.0 must be"), ({"deepspeed": "zero1"}, "does not use deepspeed"),
     ({"learning_rate": 1e-3}, "does not use learning_rate")],
)  # fmt: skip
def test_wrong_options_and_settings_of_training_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        cf.unlearn(object(), None, None, **{**QUIET, **changes})
