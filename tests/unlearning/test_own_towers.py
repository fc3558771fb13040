"""Towers of the caller's own whose layers do more than multiply."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny import QUICK
from torch import nn

import cliperase_fast as cf

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import TwoTowers


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 8, 8, generator=generator), torch.tensor([8, 2 + number % 3, 9])) for number in range(24)]
    return pairs[::3], pairs[1::3] + pairs[2::3]


def test_embeddings_that_renormalise_their_rows_are_left_as_they_were(sets):
    model = TwoTowers()
    model.text_embedding = nn.Embedding(50, 12, max_norm=0.5)
    before = model.text_embedding.weight.detach().clone()
    result = cf.unlearn(model, *sets, **QUICK)
    cf.evaluate(model, sets[0], progress=False)
    cf.audit(model, result.model, *sets, progress=False)
    assert torch.equal(model.text_embedding.weight, before)


def test_instance_norms_keep_the_originals_statistics(sets):
    model = TwoTowers()
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model.image_tower.insert(0, norm)
    norm.running_var.fill_(2)
    result = cf.unlearn(model, *sets, **QUICK)
    trained = result.model.image_tower[0]
    assert torch.equal(trained.running_var, norm.running_var) and torch.equal(trained.running_mean, norm.running_mean)
    assert not torch.equal(trained.weight, norm.weight)


def test_an_audit_that_would_train_embeddings_with_sparse_gradients_says_so_first(sets):
    model = TwoTowers()
    model.text_embedding.sparse = True
    with pytest.raises(cf.InputError, match=r"set model\.text_embedding\.sparse = False"):
        cf.audit(model, TwoTowers(), *sets, depth=True, progress=False)
    cf.audit(model, TwoTowers(), *sets, progress=False)


class Indirect(TwoTowers):
    """Reaches its image tower by something that a copy shares with the original."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        if how == "lambda":
            self.tower = lambda pixels: self.image_tower(pixels)
        elif how == "weak reference":
            self.image_norm.owner = weakref.ref(self)

    def encode_image(self, pixels):
        if self.how == "lambda":
            return self.image_norm(self.tower(pixels))
        return self.image_norm(self.image_norm.owner().image_tower(pixels))


@pytest.mark.parametrize("how", ["lambda", "weak reference"])
def test_a_copy_that_uses_the_given_models_weights_is_refused_and_leaves_them_no_gradient(sets, how):
    model = Indirect(how)
    with pytest.raises(cf.InputError, match=r"encode_image of a copy of the Indirect uses .* reach its parts through"):
        cf.unlearn(model, *sets, **QUICK)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_are_neither_written_to_nor_given_gradients(sets):
    class Writing(TwoTowers):
        def encode_image(self, pixels):
            return super().encode_image(pixels.mul_(0.5))

    given = [[(image.clone(), caption) for image, caption in part] for part in sets]
    cf.unlearn(Writing(), *given, **QUICK)
    assert all(
        torch.equal(a, b) for one, two in zip(given, sets, strict=True) for (a, _), (b, _) in zip(one, two, strict=True)
    )
    for part in given:
        for image, _ in part:
            image.requires_grad_()
    cf.unlearn(TwoTowers(), *given, **QUICK)
    assert all(image.grad is None for part in given for image, _ in part)


class Merging(nn.Linear):
    """A linear layer whose update is part of its weight in evaluation mode, as in loralib."""

    def __init__(self):
        super().__init__(12, 12)
        self.update, self.merged = nn.Parameter(torch.full((12, 12), 0.5)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.update.T)


def test_layers_that_merge_an_update_for_evaluation_get_it_out_again(sets):
    model = TwoTowers()
    model.text_proj = Merging()
    result = cf.unlearn(model, *sets, **QUICK)
    cf.evaluate(model, sets[0], progress=False)
    for trained in (model, result.model):
        assert trained.text_proj.training and not trained.text_proj.merged
