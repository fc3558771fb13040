"""cf.ClipLoss, cf.DistillClipLoss and cf.SigLipLoss against open_clip's own."""

from __future__ import annotations

import inspect
import subprocess
import sys

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from processes import apart, peak

import cliperase_fast as cf
from cliperase_fast.benchmarks import trainers

NAMES = ("ClipLoss", "DistillClipLoss", "SigLipLoss")


def features(n, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=g, dtype=torch.float64), dim=1).to(dtype)


def batch(name, n=33, dtype=torch.float32, bias=True):
    """Keyword arguments as `open_clip_train` passes them."""
    inputs = {
        "image_features": features(n, 24, dtype, 1).requires_grad_(),
        "text_features": features(n, 24, dtype, 2).requires_grad_(),
        "logit_scale": torch.tensor(14.0, dtype=dtype, requires_grad=True),
    }
    if name == "DistillClipLoss":
        teacher = {"dist_image_features": features(n, 16, dtype, 3), "dist_text_features": features(n, 16, dtype, 4)}
        return {**inputs, **teacher, "dist_logit_scale": torch.tensor(9.0, dtype=dtype)}
    return {**inputs, "logit_bias": torch.tensor(-3.0, dtype=dtype, requires_grad=True)} if bias else inputs


def outcome(loss, inputs):
    losses = loss(**inputs, output_dict=True)
    wanted = [value for value in inputs.values() if value.requires_grad]
    return losses, torch.autograd.grad(sum(losses.values()), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 33, 300])  # 300 pairs are streamed
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_losses_and_gradients_are_open_clips(name, n, dtype, tolerance):
    inputs = batch(name, n, dtype)
    ours, our_gradients = outcome(getattr(cf, name)(), inputs)
    stock, stock_gradients = outcome(getattr(open_clip.loss, name)(), inputs)
    assert ours.keys() == stock.keys()
    for key, value in stock.items():
        assert ours[key].item() == pytest.approx(value.item(), rel=tolerance, abs=tolerance)
    for ours, right in zip(our_gradients, stock_gradients, strict=True):
        assert ours.dtype == right.dtype
        torch.testing.assert_close(ours, right, rtol=0, atol=tolerance * max(1.0, right.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_open_clips_classes_with_the_same_arguments(name):
    ours, stock = getattr(cf, name), getattr(open_clip.loss, name)
    assert isinstance(ours(), stock)
    for method in ("__init__", "forward"):
        mine, theirs = (
            [
                (p.name, p.kind, p.default)
                for p in inspect.signature(getattr(kind, method)).parameters.values()
                if p.kind is not p.VAR_KEYWORD  # for what a newer open_clip may add
            ]
            for kind in (ours, stock)
        )
        assert mine == theirs


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_sets_what_open_clips_does(name):
    arguments = (True, 0, 1, "gather") if name == "SigLipLoss" else (True, True, True, 0, 1, False)
    words = list(inspect.signature(getattr(open_clip.loss, name)).parameters)
    keywords = dict(zip(words, arguments, strict=False))  # open_clip 4 has other last ones
    arguments = tuple(keywords.values())
    made = [kind(*arguments) for kind in (getattr(cf, name), getattr(open_clip.loss, name))]
    made.append(getattr(cf, name)(**keywords))
    for ours in (made[0], made[2]):
        assert {key: getattr(ours, key) for key in keywords} == {key: getattr(made[1], key) for key in keywords}
        torch.testing.assert_close(ours(**batch(name)), made[1](**batch(name)))


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_give_the_plain_result(name):
    inputs = batch(name, bias=name == "SigLipLoss")
    ours, stock = (kind()(*inputs.values()) for kind in (getattr(cf, name), getattr(open_clip.loss, name)))
    torch.testing.assert_close(ours, stock)


def test_a_bias_takes_part_in_the_clip_loss_with_gradient_zero():
    """DDP waits for the gradient of every parameter."""
    inputs = batch("ClipLoss")
    (gradient,) = torch.autograd.grad(cf.ClipLoss()(**inputs), [inputs["logit_bias"]])
    assert gradient.item() == 0
    without = cf.ClipLoss()(**{**inputs, "logit_bias": None})
    assert cf.ClipLoss()(**inputs).item() == without.item()


def test_a_bias_that_is_not_constant_and_overridden_logits_are_left_to_open_clip():
    inputs = batch("ClipLoss") | {"logit_bias": torch.linspace(-1, 1, 33)}
    assert cf.ClipLoss()(**inputs).item() == open_clip.loss.ClipLoss()(**inputs).item()

    def halved(self, *features, **options):
        return [logits / 2 for logits in open_clip.loss.ClipLoss.get_logits(self, *features, **options)]

    inputs = batch("ClipLoss", bias=False)
    ours = type("Mine", (cf.ClipLoss,), {"get_logits": halved})()(**inputs)
    stock = type("Theirs", (open_clip.loss.ClipLoss,), {"get_logits": halved})()(**inputs)
    assert ours.item() == stock.item()


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_a_newer_open_clip_adds_is_left_to_open_clip(name, monkeypatch):
    stock = getattr(open_clip.loss, name)
    forward = stock.forward
    seen = []

    def newer(self, *features, temperature=1.0, **options):
        seen.append(temperature)
        return forward(self, *features, **options)

    newer.__signature__ = inspect.signature(forward).replace(
        parameters=[
            *inspect.signature(forward).parameters.values(),
            inspect.Parameter("temperature", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=1.0),
        ]
    )
    monkeypatch.setattr(stock, "forward", newer)
    inputs = batch(name)
    with cf.patch_open_clip() as patch:
        assert f"open_clip.loss.{name}" in patch.replaced
    plain = getattr(cf, name)()(**inputs)
    before = len(seen)
    torch.testing.assert_close(getattr(cf, name)()(**inputs, temperature=2.0), plain)
    assert seen[before:] == [2.0]


def test_features_are_gathered_with_the_arguments_that_open_clip_takes(monkeypatch):
    def gather(image, text, local_loss=False, gather_with_grad=False, rank=0, world_size=1):
        return torch.cat([image, image]), torch.cat([text, text])

    monkeypatch.setattr(open_clip.loss, "gather_features", gather)
    monkeypatch.setenv("CLIPERASE_BACKEND", "eager")
    loss = cf.ClipLoss(rank=0, world_size=2)
    vars(loss).pop("use_horovod", None)  # as with open_clip 4
    inputs = {key: value.detach() for key, value in batch("ClipLoss", bias=False).items()}
    doubled = {key: torch.cat([value, value]) if value.ndim else value for key, value in inputs.items()}
    torch.testing.assert_close(loss(**inputs), cf.ClipLoss()(**doubled))


def test_scales_may_be_numbers_or_tensors_of_one_element():
    inputs = batch("ClipLoss", bias=False)
    losses = [cf.ClipLoss()(**{**inputs, "logit_scale": scale}) for scale in (14.0, torch.tensor([14.0]))]
    torch.testing.assert_close(losses, [cf.ClipLoss()(**inputs)] * 2)


def test_a_teacher_that_wants_gradients_is_refused_by_name():
    inputs = batch("DistillClipLoss")
    inputs["dist_text_features"].requires_grad_()
    with pytest.raises(cf.InputError, match="frozen"):
        cf.DistillClipLoss()(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_losses_stay_exact(name):
    inputs = {key: value.detach() for key, value in batch(name).items()}
    exact = getattr(cf, name)()(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(getattr(cf, name)()(**inputs), exact)  # bfloat16 would be off by 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_fifty_steps_follow_the_stock_curve(name):
    """The measurement of docs/trainers.md; 512 pairs a step, which are streamed."""
    run = trainers.compare(name, trainers.open_clip_curve)
    assert run["largest_difference"] < 1e-4
    assert run["last"] < run["first"] / 2


def extra_memory(name):
    """Bytes at the peak of a step beyond inputs."""

    def step(n):
        image, text, *teacher = (F.normalize(torch.randn(n, 32), dim=1) for _ in range(4))
        image.requires_grad_(), text.requires_grad_()
        extra = {"DistillClipLoss": (*teacher, 20.0), "SigLipLoss": (-10.0,)}.get(name, ())
        losses = getattr(cf, name)()(image, text, 20.0, *extra, output_dict=True)
        sum(losses.values()).backward()

    step(300)
    return peak(lambda: step(4096))


@pytest.mark.parametrize("name", NAMES)
def test_no_similarity_matrix_is_held(name):
    extra = apart(extra_memory, name, CLIPERASE_KEEP_MIB="1")
    assert 0 < extra < 0.9 * 4 * 4096**2, f"{extra / 2**20:.0f} MiB"


def test_the_losses_and_ops_import_without_open_clip():
    """With open_clip unimportable, the core works and cf.ClipLoss says what to install."""
    code = """
import sys, importlib.metadata as metadata
sys.modules["open_clip"] = None
found = metadata.version
def version(name):
    if name == "open_clip_torch":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import torch, cliperase_fast as cf
import cliperase_fast.contrastive
assert cf.functional.clip_loss(torch.eye(3), torch.eye(3), 1.0) > 0
try:
    cf.ClipLoss
except cf.InputError as error:
    assert "pip install" in str(error) and "open_clip_torch" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
