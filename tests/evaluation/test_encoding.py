from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lookup_model import DIM, LookupModel, as_pixels, directions
from PIL import Image

from cliperase_fast.data import as_pairs
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.evaluation import Unchanged, encode_pairs, pair_similarities, require_finite
from cliperase_fast.models import load_model
from cliperase_fast.models.fast_paths.frozen_front import FrozenFront

NAMES = ("red", "green", "blue")
CAPTIONS = dict(zip([f"{a} {c}" for a in ("a", "the") for c in NAMES], directions(6), strict=True))


@pytest.fixture
def model():
    return LookupModel(CAPTIONS)


@pytest.fixture
def adapter(model):
    return load_model(model, tokenizer=model.tokenizer)


def coloured(count=14, seed=1, captions=lambda name: f"a {name}"):
    """Images with captions that repeat, so that the captions are classes."""
    return [(as_pixels(row), captions(NAMES[i % 3])) for i, row in enumerate(directions(count, seed))]


def encode(adapter, pairs, **options):
    return encode_pairs(adapter, as_pairs(pairs, "data"), **{"batch_size": 4, "device": "cpu", **options})


def test_features_are_in_order_and_each_caption_is_encoded_once(adapter, model):
    encoded = encode(adapter, coloured())
    torch.testing.assert_close(encoded.image_features, directions(14, 1))
    assert model.images_seen == 14
    assert sorted(model.captions_seen) == [0, 1, 2]  # the prompts of the classes are these captions
    assert [rows.tolist() for rows in encoded.caption_index] == [[i % 3] for i in range(14)]
    torch.testing.assert_close(encoded.caption_features, directions(6)[:3])
    assert encoded.image_features.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_nothing(adapter, batch_size):
    one, other = encode(adapter, coloured()), encode(adapter, coloured(), batch_size=batch_size)
    torch.testing.assert_close(one.image_features, other.image_features)
    torch.testing.assert_close(one.caption_features, other.caption_features)


def test_what_is_not_trained_is_computed_once(adapter, model):
    passes = []
    front = FrozenFront(lambda pixels: passes.append(len(pixels)) or pixels, adapter.encode_image)
    unchanged = Unchanged(text=True, front=front, budget=2**20)
    first = encode(adapter, coloured(), unchanged=unchanged)
    assert unchanged.size == 4 * 14 * as_pixels(directions(1)[0]).numel()
    captions = list(model.captions_seen)
    again = encode(adapter, coloured(), unchanged=unchanged)
    assert passes == [4, 4, 4, 2]
    assert model.captions_seen == captions
    for one in (first, again):
        assert torch.equal(one.image_features, encode(adapter, coloured()).image_features)
        assert torch.equal(one.caption_features, first.caption_features)


@pytest.mark.parametrize(("budget", "error"), [(10, 0.0), (2**20, 1e-6)])
def test_a_front_without_room_or_with_other_bits_is_not_used(adapter, budget, error):
    front = FrozenFront(lambda pixels: pixels, lambda kept: adapter.encode_image(kept) + error)
    unchanged = Unchanged(front=front, budget=budget)
    for _ in range(2):
        assert torch.equal(
            encode(adapter, coloured(), unchanged=unchanged).image_features, encode(adapter, coloured()).image_features
        )
    assert unchanged.size == 0


def test_all_captions_of_an_image_are_used(adapter):
    encoded = encode(adapter, [(as_pixels(row), ["a red", "the red"]) for row in directions(3)])
    assert [rows.tolist() for rows in encoded.caption_index] == [[0, 1]] * 3


def test_class_features_are_the_normalised_mean_of_their_prompts(adapter):
    pairs = as_pairs(coloured(captions=lambda name: [f"a {name}", f"the {name}"]), "data")
    encoded = encode_pairs(adapter, pairs, batch_size=4, device="cpu")
    rows = directions(6)
    order = [NAMES.index(name) for name in pairs.classes]
    torch.testing.assert_close(encoded.class_features, F.normalize(rows[order] + rows[3:][order], dim=-1))


def test_templates_replace_the_prompts(adapter):
    encoded = encode(adapter, coloured(), templates=["the {}"])
    order = [NAMES.index(name) for name in as_pairs(coloured(), "data").classes]
    torch.testing.assert_close(encoded.class_features, directions(6)[3:][order])
    assert len(encoded.caption_features) == 3


def test_without_classes_there_are_no_class_features(adapter):
    assert encode(adapter, [(as_pixels(row), "a red") for row in directions(1)]).class_features is None


def test_token_captions_pass_as_they_are(adapter):
    encoded = encode(adapter, [(as_pixels(row), torch.tensor([i % 2])) for i, row in enumerate(directions(6, 1))])
    assert [rows.tolist() for rows in encoded.caption_index] == [[i % 2] for i in range(6)]
    torch.testing.assert_close(encoded.caption_features, directions(6)[:2])


def test_pil_images_go_through_the_transform(model):
    def transform(image):
        return torch.full((3, 2, 2), image.getpixel((0, 0))[0] / 255.0)

    adapter = load_model(model, tokenizer=model.tokenizer, transform=transform)
    encoded = encode(adapter, [(Image.new("RGB", (5, 4), (200, 0, 0)), "a red")])
    torch.testing.assert_close(encoded.image_features, F.normalize(torch.ones(1, DIM), dim=-1))


def test_pil_images_without_a_transform_are_an_error(adapter):
    with pytest.raises(InputError, match="pass transform="):
        encode(adapter, [(Image.new("RGB", (5, 4)), "a red")])


def test_images_of_different_sizes_are_an_error(model):
    adapter = load_model(model, tokenizer=model.tokenizer, transform=lambda image: torch.zeros(3, *image.size))
    with pytest.raises(InputError, match=r"different shapes.*\(3, 4, 5\)"):
        encode(adapter, [(Image.new("RGB", (5, 4)), "a red"), (Image.new("RGB", (4, 5)), "a red")])


def test_encoding_uses_evaluation_mode_and_restores_each_module(adapter, model):
    model.train()
    model.table.eval()  # as a caller does who freezes a part
    encode(adapter, coloured())
    assert model.modes and not any(model.modes)
    assert model.training
    assert model.gain.training
    assert not model.table.training


def on_the_cpu(_):
    return torch.empty(2**46)  # 256 TiB


def on_a_gpu(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 TiB.")


@pytest.mark.parametrize("runs_out", [on_the_cpu, on_a_gpu])
@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_out_of_memory_is_an_error_with_a_remedy(model, tower, runs_out):
    setattr(model, tower, runs_out)
    adapter = load_model(model, tokenizer=model.tokenizer)
    with pytest.raises(UnlearningError, match=r"out of memory while encoding: .*smaller batch_size.*allocate"):
        encode(adapter, coloured())


def test_images_of_a_wrong_size_are_an_error_with_their_shape(model):
    model.encode_image = lambda pixels: pixels.flatten(1) @ torch.ones(7, 7)
    with pytest.raises(InputError, match=r"cannot encode images of shape \(3, 2, 2\)"):
        encode(load_model(model, tokenizer=model.tokenizer), coloured())


@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
@pytest.mark.parametrize("error", [ValueError("another size"), AssertionError("another size")])
def test_whatever_a_library_raises_for_a_wrong_size_becomes_an_input_error(model, tower, error):
    def fail(inputs):
        raise error

    setattr(model, tower, fail)
    with pytest.raises(InputError, match=r"the model cannot encode .*\(another size\): (give tensors|use its own)"):
        encode(load_model(model, tokenizer=model.tokenizer), coloured())


def test_an_error_in_the_models_own_code_is_told_apart_from_wrong_inputs(model):
    model.encode_text = lambda tokens, mask: None
    with pytest.raises(InputError, match=r"\(TypeError: .*'mask'\): correct the model's own code"):
        encode(load_model(model, tokenizer=model.tokenizer), coloured())


def test_modes_are_restored_after_an_error(adapter, model):
    model.train()
    with pytest.raises(InputError):
        encode(adapter, [(Image.new("RGB", (5, 4)), "a red")])
    assert model.training


def test_a_model_with_lazy_buffers_can_be_trained_after_encoding():
    class Lazy(LookupModel):
        mask = None

        def encode_image(self, pixels):
            if self.mask is None:
                self.mask = torch.ones(DIM)
            return super().encode_image(pixels) * self.mask

    model = Lazy(CAPTIONS)
    encode(load_model(model, tokenizer=model.tokenizer), coloured())
    model.encode_image(torch.ones(2, 3, 2, 2)).sum().backward()
    assert model.gain.weight.grad is not None


def test_the_global_random_state_is_unchanged(adapter):
    state = torch.get_rng_state()
    encode(adapter, coloured())
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_processes_give_the_same_features(adapter):
    one, other = encode(adapter, coloured()), encode(adapter, coloured(), num_workers=1)
    assert torch.equal(one.image_features, other.image_features)


def test_bf16_runs_the_encoders_in_bf16_and_returns_float32_unit_rows():
    class Recorder(LookupModel):
        def encode_image(self, pixels):
            features = super().encode_image(pixels)
            dtypes.add(features.dtype)
            return features

    dtypes: set = set()
    model = Recorder(CAPTIONS)
    adapter = load_model(model, tokenizer=model.tokenizer)
    exact, half = encode(adapter, coloured()), encode(adapter, coloured(), precision="bf16")
    assert dtypes == {torch.float32, torch.bfloat16}
    assert half.image_features.dtype == torch.float32
    torch.testing.assert_close(half.image_features.norm(dim=-1), torch.ones(14), atol=1e-5, rtol=0)
    torch.testing.assert_close(half.image_features, exact.image_features, atol=0.01, rtol=0)


def test_pair_similarities_are_means_over_each_images_captions(adapter):
    pairs = [(as_pixels(row), ["a red", "the blue"][: 1 + i % 2]) for i, row in enumerate(directions(5, 1))]
    similarities = pair_similarities(encode(adapter, pairs))
    images, texts = directions(5, 1), directions(6)
    expected = [(images[i] @ texts[[0, 5][: 1 + i % 2]].T).mean().item() for i in range(5)]
    assert similarities.dtype == np.float32
    np.testing.assert_allclose(similarities, expected, atol=1e-6)


def test_nonfinite_features_are_traced_to_their_image(adapter):
    pairs = as_pairs(coloured(), "holiday photos")
    encoded = encode_pairs(adapter, pairs, batch_size=4, device="cpu")
    require_finite(encoded, pairs)
    encoded.image_features[7, 3] = torch.nan
    with pytest.raises(InputError, match=r"1 of the 14 image features.*'7' in holiday photos"):
        require_finite(encoded, pairs)
    encoded.caption_features[0, 0] = torch.inf
    with pytest.raises(InputError, match="text features"):
        require_finite(encoded, pairs)


def test_progress_is_silent_without_a_bar(adapter, capfd):
    encode(adapter, coloured(), progress=False)
    assert capfd.readouterr() == ("", "")
    encode(adapter, coloured(), progress=True)
    told = capfd.readouterr()
    assert told.out == "" and "encoding" in told.err


def test_no_pairs_are_an_error(adapter):
    pairs = as_pairs(coloured(), "data").subset([])
    with pytest.raises(InputError, match="data is empty"):
        encode_pairs(adapter, pairs, batch_size=4, device="cpu")
