"""Models that cannot be saved are refused before training, and saved models are read back and compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TwoTowers, pixels_for, tiny_clip, tiny_open_clip
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import CLIPModel

import cliperase_fast as cf
from cliperase_fast import export
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.models import equivalence, load_model
from cliperase_fast.models.adapters.base import ClipAdapter

SMALL: dict[str, Any] = {"text_cfg": {"vocab_size": 60}}
MAKE: dict[str, Callable[[], Any]] = {
    "open_clip": lambda: tiny_open_clip(**SMALL),
    "transformers": tiny_clip,
    "generic": TwoTowers,
}


@pytest.fixture
def data() -> tuple[list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.tensor([8, word, 9, 0, 0]) for word in (2, 3, 4)]
    pairs = [(torch.randn(3, 8, 8, generator=generator), tokens[index % 3]) for index in range(24)]
    return pairs[::3], pairs[1::3] + pairs[2::3]


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Path], None]) -> None:
    """Let `change` have the folder between writing and reading back."""
    adapter = type(load_model(MAKE[kind]()))
    write = adapter._write

    def spoiled(self: ClipAdapter, directory: Path, final: Path) -> None:
        write(self, directory, final)  # type: ignore[arg-type]
        change(directory)

    monkeypatch.setattr(adapter, "_write", spoiled)


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def drop_a_weight(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [flip_a_bit, drop_a_weight])
@pytest.mark.parametrize("kind", MAKE)
def test_a_folder_with_wrong_weights_is_not_reported_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Path], None]
) -> None:
    spoil(monkeypatch, kind, change)
    model = MAKE[kind]()
    with pytest.raises(
        UnlearningError, match=r"was not saved to .*model: the folder (holds a different|lacks)"
    ) as raised:
        load_model(model).save(tmp_path / "model")
    safe = tmp_path / "model-state-dict.safetensors"
    assert str(safe) in str(raised.value)
    assert os.listdir(tmp_path) == [safe.name]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(safe).items())


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_a_folder_with_a_wrong_configuration_is_not_reported_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def change(folder: Path) -> None:
        path = folder / {"open_clip": "open_clip_config.json", "transformers": "config.json"}[kind]
        text = path.read_text()
        old, new = {
            "open_clip": ('"head_width": 12', '"head_width": 24'),
            "transformers": ('"num_attention_heads": 4', '"num_attention_heads": 2'),
        }[kind]
        assert old in text
        path.write_text(text.replace(old, new))

    spoil(monkeypatch, kind, change)
    with pytest.raises(UnlearningError, match="loads as a model whose features differ by"):
        load_model(MAKE[kind]()).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_large_models_are_compared_without_loading_a_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "LOADED_WHOLE", 0)
    adapter = load_model(tiny_clip())
    monkeypatch.setattr(type(adapter), "reload", lambda *arguments: pytest.fail("a second model was built"))
    adapter.save(tmp_path / "model")
    spoil(monkeypatch, "transformers", flip_a_bit)
    with pytest.raises(UnlearningError, match="holds a different"):
        adapter.save(tmp_path / "other")


def scaled(model: Any, shape: list[int]) -> Any:
    model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(shape))
    return model


@pytest.mark.parametrize("shape", [[1], [1, 1]])
def test_a_scale_of_one_element_is_saved_as_both_libraries_load_it(tmp_path: Path, shape: list[int]) -> None:
    model = scaled(tiny_clip(), shape)
    load_model(model).save(tmp_path / "hf")
    assert CLIPModel.from_pretrained(tmp_path / "hf").logit_scale == model.logit_scale.item()
    assert load_model(tmp_path / "hf").logit_scale() == load_model(model).logit_scale()
    assert list(model.logit_scale.shape) == shape
    assert export.to_open_clip(model).logit_scale == model.logit_scale.item()

    biased = {**SMALL, "custom_text": True, "init_logit_bias": -10.0}
    for changes in (SMALL, biased):
        model = scaled(tiny_open_clip(**changes), shape)
        folder = tmp_path / f"open_clip {len(changes)}"
        load_model(model).save(folder)
        assert open_clip.create_model(f"local-dir:{folder}").logit_scale == model.logit_scale.item()
        assert load_model(folder).logit_scale() == load_model(model).logit_scale()
    assert export.to_transformers(scaled(tiny_open_clip(**SMALL), shape)).logit_scale.shape == ()


def quantized(model: Any) -> Any:
    model.text_proj = torch.ao.nn.quantized.dynamic.Linear(12, 12)
    return model


def float8(model: Any) -> Any:
    model.text_proj.weight = nn.Parameter(model.text_proj.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def lazy(model: Any) -> Any:
    model.text_proj = nn.LazyLinear(12)
    return model


def on_meta(model: Any) -> Any:
    model.register_buffer("table", torch.zeros(2, device="meta"))
    return model


def sparse(model: Any) -> Any:
    model.register_buffer("table", torch.eye(3).to_sparse())
    return model


def with_state(model: Any) -> Any:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

    model.text_proj = Counting(12, 12)
    return model


def sparse_gradients(model: Any) -> Any:
    model.text_embedding.sparse = True
    return model


def complex_valued(model: Any) -> Any:
    model.text_phase = nn.Parameter(torch.ones(12, dtype=torch.complex64))
    return model


def partly_saved(model: Any) -> Any:
    def leave_out(module: nn.Module, state: dict[str, Tensor], *others: Any) -> None:
        del state["text_embedding.weight"]

    model.register_state_dict_post_hook(leave_out)
    return model


def partitioned(model: Any) -> Any:
    model.text_proj.weight.ds_id = 3
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (quantized, "text_proj of the TwoTowers is quantized .* without quantization"),
        (float8, "text_proj.weight of the TwoTowers is quantized .*float8"),
        (lazy, "text_proj.weight of the TwoTowers has no shape yet; run the model once"),
        (on_meta, r"weights on the meta device \(table\)"),
        (sparse, "table of the TwoTowers is a sparse tensor"),
        (sparse_gradients, r"text_embedding of the TwoTowers has sparse=True.*set model.text_embedding.sparse = False"),
        (complex_valued, r"text_phase of the TwoTowers is complex.*model.text_phase.requires_grad_\(False\)"),
        (with_state, "text_proj._extra_state in the state dict .* is a dict"),
        (partly_saved, "text_embedding.weight of the TwoTowers is not in the model's state dict"),
        (partitioned, r"sharded by DeepSpeed's ZeRO-3; .*save_16bit_model"),
    ],
)
def test_weights_that_cannot_be_trained_or_saved_are_refused_before_training(
    tmp_path: Path, data: Any, change: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        cf.unlearn(change(TwoTowers()), *data, output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_parametrized_weights_are_kept_by_own_towers_and_refused_for_libraries(tmp_path: Path) -> None:
    own: Any = TwoTowers()
    weight_norm(own.text_proj)
    spectral_norm(own.image_blocks[0].linear)
    adapter = load_model(own.eval())
    adapter.clone().save(tmp_path / "model")
    twin: Any = TwoTowers()
    weight_norm(twin.text_proj)
    spectral_norm(twin.image_blocks[0].linear)
    twin.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    assert load_model(twin).identity() == adapter.identity()

    model: Any = tiny_open_clip(**SMALL)
    weight_norm(model.visual.transformer.resblocks[0].mlp.c_fc)
    clip: Any = tiny_clip()
    spectral_norm(clip.visual_projection)
    for changed in (model, clip):
        with pytest.raises(InputError, match=r"is parametrized .*remove_parametrizations\(model\.") as raised:
            load_model(changed).check_saveable()
        call = str(raised.value).rpartition("torch.nn.utils.parametrize.")[2]
        eval(call, {"remove_parametrizations": parametrize.remove_parametrizations, "model": changed})
        load_model(changed).check_saveable()  # the remedy works


def test_a_clip_model_that_its_configuration_does_not_describe_is_refused_before_training() -> None:
    class Doubled(CLIPModel):
        def get_text_features(self, *arguments: Any, **options: Any) -> Tensor:
            output = super().get_text_features(*arguments, **options)
            return getattr(output, "pooler_output", output) ** 3

    other: Any = Doubled(tiny_clip().config).eval()
    with pytest.raises(InputError, match="computes features that differ by"):
        load_model(other).check_saveable()
    more: Any = tiny_clip()
    more.bridge = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"bridge\.weight, which the configuration does not have, and 1 more"):
        load_model(more).check_saveable()
    wide: Any = tiny_clip()
    wide.text_projection = nn.Linear(32, 12, bias=False)
    with pytest.raises(InputError, match=r"text_projection\.weight, which is \[12, 32\] where .* says \[24, 32\]"):
        load_model(wide).check_saveable()


def test_a_transformers_model_of_mixed_dtypes_can_be_saved(tmp_path: Path) -> None:
    model: Any = tiny_clip().half()
    model.visual_projection.float()  # takes half-precision inputs under autocast only
    load_model(model).save(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model")).module
    assert all(torch.equal(w, v.float()) for w, v in zip(loaded.parameters(), model.parameters(), strict=True))


def test_shared_weights_are_saved_completely(tmp_path: Path) -> None:
    model: Any = tiny_clip()
    model.text_projection.weight = model.visual_projection.weight
    load_model(model).save(tmp_path / "model")
    again = CLIPModel.from_pretrained(tmp_path / "model").eval()
    pixels = pixels_for(model)
    torch.testing.assert_close(load_model(again).encode_image(pixels), load_model(model).encode_image(pixels))
    assert torch.equal(again.text_projection.weight, model.visual_projection.weight)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model: Any = TwoTowers()
    model.cache = model.text_proj.weight * 2  # a tensor with a graph behind it
    with pytest.raises(InputError, match="TwoTowers cannot be copied"):
        load_model(model).clone()


@pytest.mark.parametrize(
    ("compute", "remedy"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (torch.nn.utils.weight_norm, "remove_weight_norm"),
    ],
)
def test_weights_that_a_hook_computes_are_refused_with_the_call_that_makes_them_plain(
    compute: Callable[[nn.Module], Any], remedy: str
) -> None:
    model: Any = TwoTowers()
    compute(model.text_proj)
    with pytest.raises(InputError, match=r"computes text_proj\.weight from other weights") as raised:
        load_model(model).clone()
    call = "torch" + str(raised.value).rpartition(": torch")[2]
    assert remedy in call
    eval(call, {"torch": torch, "model": model})
    load_model(model).clone()  # the remedy works
    clip = tiny_clip()
    compute(clip.text_projection)
    with pytest.raises(InputError, match=r"text_projection\.weight is parametrized .*" + remedy):
        load_model(clip).check_saveable()


class Odd(TwoTowers):
    def __init__(self, method: str, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        setattr(self, method, lambda inputs: change(getattr(TwoTowers, method)(self, inputs)))


@pytest.mark.parametrize("method", ["encode_image", "encode_text"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: (x, x), r"must return features \[B, D\], not tuple"),
        (lambda x: {"x": x}, r"must return features \[B, D\], not dict"),
        (lambda x: x[:, None], r"must return features \[B, D\], not \[3, 1, 12\]"),
        (lambda x: x[:1], "returned 1 rows for 3 inputs"),
        (lambda x: x.long(), "returned torch.int64 values"),
    ],
)
def test_encoders_that_return_something_else_are_named(method: str, change: Any, says: str) -> None:
    adapter = load_model(Odd(method, change))
    inputs = torch.zeros(3, 3, 8, 8) if method == "encode_image" else torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(InputError, match=f"Odd.{method} {says}"):
        getattr(adapter, method)(inputs)


def test_encoders_of_two_widths_are_named_before_training(tmp_path: Path, data: Any) -> None:
    with pytest.raises(InputError, match="encode_image returns 12 features and encode_text 7"):
        model = TwoTowers()
        model.text_proj = nn.Linear(12, 7)
        cf.unlearn(model, *data, output_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["mps", "xpu", "tpu", "cuda:99", "meta"])
def test_devices_that_are_not_supported_or_not_here_are_named(data: Any, device: str) -> None:
    for call in (
        lambda: load_model(TwoTowers(), device=device),
        lambda: cf.unlearn(TwoTowers(), *data, device=device, progress=False),
        lambda: cf.evaluate(TwoTowers(), data[0], device=device, progress=False),
    ):
        with pytest.raises(InputError, match=f"device='{device}' is not"):
            call()
