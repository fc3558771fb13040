"""Test losses under torch.func, forward mode, inference mode, checkpointing and export, and with tensor views."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from loss_cases import BACKENDS, WIDTH, N, gradients, inputs, losses, rows
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cliperase_fast.contrastive import distill_clip_loss, local_clip_loss, sigmoid_loss
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.functional import clip_loss, similarity_kl
from cliperase_fast.ops.registry import REGISTRY

STREAMED = [name for name in BACKENDS if name != "eager"]


def assert_near(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def forward_mode(loss, image, text, scale):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(image, rows(8, image.dtype)), text, scale)).tangent


TRANSFORMS = {
    "grad": lambda f, x, y, s: torch.func.grad(f)(x, y, s),
    "grad of the scale": lambda f, x, y, s: torch.func.grad(f, argnums=2)(x, y, s),
    "vmap": lambda f, x, y, s: torch.func.vmap(f, (0, None, None))(torch.stack((x, y)), y, s),
    "vmap of grad": lambda f, x, y, s: torch.func.vmap(torch.func.grad(f), (0, None, None))(torch.stack((x, y)), y, s),
    "jvp": lambda f, x, y, s: torch.func.jvp(lambda x: f(x, y, s), (x,), (rows(8, x.dtype),)),
    "forward mode": forward_mode,
    "second derivative": lambda f, x, y, s: torch.func.hessian(lambda s: f(x, y, s))(s),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_have_the_derivatives_of_the_float64_reference(backend, transform):
    tensors = [tensor.detach() for tensor in inputs()]
    exact = [tensor.double() for tensor in tensors]
    for name, loss in losses(backend).items():
        reference = losses("eager", torch.float64)[name]
        expected = TRANSFORMS[transform](reference, *exact)
        ours = TRANSFORMS[transform](loss, *tensors)
        for a, b in zip(*(found if isinstance(found, tuple) else (found,) for found in (ours, expected)), strict=True):
            assert_near(a.double(), b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_may_come_in_batches(backend):
    for loss in losses(backend).values():
        leaves = inputs()
        total = loss(*leaves)
        batched = torch.autograd.grad(total, leaves, torch.tensor([1.0, -2.5]), is_grads_batched=True)
        for found, single in zip(batched, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            assert_near(found, torch.stack((single, -2.5 * single)))


@pytest.fixture
def group(tmp_path):
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_process_group_refuses_transforms_and_second_derivatives_and_takes_inference_tensors(group):
    with torch.inference_mode():
        text = rows(2)
    for loss in (clip_loss, partial(sigmoid_loss, logit_bias=-3.0)):
        alone, shared = (partial(loss, text_features=text, logit_scale=10.0, process_group=of) for of in (None, group))
        with pytest.raises(InputError, match=r"process_group does not work under transforms of torch\.func"):
            torch.func.grad(shared)(rows(1))
        image = rows(1).requires_grad_()
        value = shared(image)
        (gradient,) = torch.autograd.grad(value, image, create_graph=True)
        assert_near(gradient.detach(), torch.autograd.grad(alone(image), image)[0])
        with pytest.raises(UnlearningError, match="second derivatives .* without a process_group"):  # noqa: RUF043
            torch.autograd.grad(value + gradient.square().sum(), image)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", ["image", "text", "scale"])
def test_tensors_made_in_inference_mode_are_taken(backend, made):
    for loss in losses(backend).values():
        expected = gradients(loss)
        leaves = dict(zip(("image", "text", "scale"), inputs(), strict=True))
        with torch.inference_mode():
            leaves[made] = leaves[made].detach().clone()
        loss(*leaves.values()).backward()
        for place, tensor in enumerate(leaves.values()):
            if not tensor.is_inference():
                assert_near(tensor.grad, expected[1 + place])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_from_inference_mode_is_taken(backend):
    image, text, scale = inputs()
    with torch.inference_mode():
        frozen = rows(3), rows(4), torch.tensor(5.0)
    plain = rows(3), rows(4), torch.tensor(5.0)
    for call in (
        lambda teacher: similarity_kl(image, text, scale, *teacher, backend=backend),
        lambda teacher: sum(distill_clip_loss(image, text, scale, *teacher, backend=backend)),
    ):
        results = [torch.autograd.grad(call(teacher), (image, text, scale)) for teacher in (frozen, plain)]
        assert_near(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_inference_mode_and_no_grad_the_values_are_the_same(backend):
    for loss in losses(backend).values():
        expected = loss(*inputs()).detach()
        with torch.inference_mode():
            assert_near(loss(*inputs()), expected)
        with torch.no_grad():
            assert_near(loss(*inputs()), expected)


def test_a_teacher_that_requires_grad_is_taken_where_no_gradient_is_wanted():
    image, text, _ = inputs()
    teacher = torch.nn.Parameter(torch.tensor(5.0))
    with torch.no_grad():
        assert similarity_kl(image, text, 10.0, image, text, teacher) > 0
    with pytest.raises(InputError, match="teacher_logit_scale requires grad"):
        similarity_kl(image, text, 10.0, image.detach(), text.detach(), teacher)


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("counted", [False, True], ids=["plain", "under a counter"])
def test_a_second_derivative_is_refused_with_the_remedy(backend, counted):
    for loss in losses(backend).values():
        leaves = inputs()
        with FlopCounterMode(display=False) if counted else torch.enable_grad():
            value = loss(*leaves)
            (gradient,) = torch.autograd.grad(value, leaves[0], create_graph=True)
        with pytest.raises(UnlearningError, match="second derivatives .* backend='eager'"):  # noqa: RUF043
            torch.autograd.grad(gradient.square().sum(), leaves[0], retain_graph=True)
        # a penalty: without the error its part of the gradient would be missing
        with pytest.raises(UnlearningError, match="second derivatives"):
            torch.autograd.grad(value + gradient.square().sum(), leaves[0])


def test_eager_has_second_derivatives():
    for name, loss in losses("eager").items():
        if name != "local":
            leaves = inputs()
            (gradient,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
            assert torch.autograd.grad(gradient.square().sum(), leaves[0])[0].abs().max() > 0, name


def as_negated(tensor: Tensor) -> Tensor:
    """An equal tensor whose memory holds the negative."""
    negated = torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag
    assert negated.is_neg() and torch.equal(negated, tensor)
    return negated


# each of rows that lie in memory in another way than the rows they read as
LAYOUTS = {
    "transposed": lambda tensor: tensor.detach().T.contiguous().T,
    "every other column": lambda tensor: torch.stack((tensor, -tensor), 2).detach().flatten(1)[:, ::2],
    "negated": as_negated,
    "reversed twice": lambda tensor: tensor.detach().flip(0).contiguous().flip(0),
    "part of a larger one": lambda tensor: torch.cat((tensor, tensor)).detach()[N:],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_have_the_gradients_of_what_they_read_as(backend, layout):
    for loss in losses(backend).values():
        image, text, scale = inputs()
        views = [LAYOUTS[layout](tensor).requires_grad_() for tensor in (image, text)]
        found = torch.autograd.grad(loss(*views, scale), (*views, scale))
        assert_near(found, gradients(loss)[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_or_column_for_all_and_one_tensor_for_both_add_up_their_gradients(backend):
    for name, loss in losses(backend).items():
        reference = losses("eager", torch.float64)[name]
        results = []
        for run, dtype in ((loss, torch.float32), (reference, torch.float64)):
            one, column, both = rows(1, dtype)[:1], rows(1, dtype)[:, :1], rows(2, dtype)
            leaves = [tensor.clone().requires_grad_() for tensor in (one, column, both)]
            total = run(leaves[0].expand(N, -1), leaves[2], torch.tensor(9.0, dtype=dtype))
            total = total + run(leaves[1].expand(-1, 8), leaves[2], torch.tensor(2.0, dtype=dtype))
            total = total + run(leaves[2], leaves[2], torch.tensor(3.0, dtype=dtype))
            results.append([gradient.double() for gradient in torch.autograd.grad(total, leaves)])
        assert_near(*results)


class Named(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_of_tensors_are_taken(backend):
    for loss in losses(backend).values():
        leaves = inputs()
        total = loss(leaves[0].as_subclass(Named), torch.nn.Parameter(leaves[1].detach()), leaves[2])
        found = torch.autograd.grad(total, leaves[0])[0]
        assert_near(found, gradients(loss)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(backend, reentrant):
    for loss in losses(backend).values():
        leaves = inputs()
        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
        assert_near(tuple(leaf.grad for leaf in leaves), gradients(loss)[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_linear_accumulate_and_may_be_asked_for_in_part(backend):
    for loss in losses(backend).values():
        expected = gradients(loss)[1:]
        leaves = inputs()
        with torch.autograd.detect_anomaly(check_nan=True):
            total = loss(*leaves)
            total.backward(torch.tensor(-3.0), retain_graph=True)
            total.backward(torch.tensor(2.0), retain_graph=True)
        assert_near(tuple(leaf.grad for leaf in leaves), tuple(-gradient for gradient in expected))
        assert_near(torch.autograd.grad(total, leaves[1])[0], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_can_be_exported(backend):
    class Module(torch.nn.Module):
        def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return torch.stack([loss(image, text, scale) for loss in losses(backend).values()])

    tensors = tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(Module(), tensors).module()
    assert_near(exported(*tensors), Module()(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["image", "text", "scale"])
def test_nonfinite_inputs_never_yield_a_finite_loss(backend, bad, where):
    for name, loss in losses(backend).items():
        leaves = dict(zip(("image", "text", "scale"), inputs(), strict=True))
        with torch.no_grad():
            leaves[where].view(-1)[-1 if where == "scale" else 2 * WIDTH] = bad  # a row that all of the losses see
        total = loss(*leaves.values())
        assert not total.isfinite(), name
        total.backward()
        assert any(not leaf.grad.isfinite().all() for leaf in leaves.values()), name


@pytest.mark.parametrize("scale", [0.0, -7.0, 1e-30])
def test_any_finite_scale_means_the_same_to_every_backend(scale):
    for name, reference in losses("eager", torch.float64).items():
        image, text, _ = inputs(torch.float64)
        factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(reference(image, text, factor), (image, text, factor))
        for backend in BACKENDS:
            image, text, _ = inputs()
            factor = torch.tensor(scale, requires_grad=True)
            found = torch.autograd.grad(losses(backend)[name](image, text, factor), (image, text, factor))
            assert_near([gradient.double() for gradient in found], list(expected))


def test_features_that_are_not_dense_are_refused():
    with pytest.raises(InputError, match=r"image_features has layout torch\.sparse_coo; pass a dense tensor"):
        clip_loss(rows(1).to_sparse(), rows(2), 10.0)
    nested = torch.nested.nested_tensor([rows(1)[0]] * len(rows(2)), layout=torch.jagged)
    with pytest.raises(InputError, match="image_features is a nested tensor"):
        clip_loss(nested, rows(2), 10.0)


def test_tensors_spread_over_ranks_are_refused(group):
    mesh = init_device_mesh("cpu", (1,))
    image, scale = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (rows(1), torch.tensor([10.0])))
    with pytest.raises(InputError, match=r"image_features is a DTensor; .* image_features\.to_local\(\)"):
        clip_loss(image, rows(2), 10.0)
    for loss in (clip_loss, sigmoid_loss):
        with pytest.raises(InputError, match="logit_scale is a DTensor; compute it in the model's forward"):
            loss(rows(1), rows(2), scale)
    assert clip_loss(image.to_local(), rows(2), 10.0) == clip_loss(rows(1), rows(2), 10.0)


def test_features_that_are_too_wide_for_a_backend_go_to_another(monkeypatch):
    wide = replace(REGISTRY["native"], widest=rows(1).shape[1] - 1)
    expected = clip_loss(rows(1), rows(2), 10.0, backend="eager")
    monkeypatch.setitem(REGISTRY, "native", wide)
    assert clip_loss(rows(1), rows(2), 10.0).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(InputError, match=r"backend='native' takes features of width .* at the most"):
        clip_loss(rows(1), rows(2), 10.0, backend="native")


@pytest.mark.parametrize("offset", [-1, 2.5, "a", len(rows(2))])
def test_a_place_that_is_no_row_of_the_keys_is_refused(offset):
    with pytest.raises(InputError, match="must be an integer from which keys"):
        local_clip_loss(rows(1)[:2], rows(2), 10.0, offset)
