"""Models named by a string: architectures with tags or files, folders, and every way that can go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file
from tiny_models import CAPTIONS, picture, pixels_for, tiny_config, tiny_open_clip

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model, loading
from cliperase_fast.models.adapters import open_clip_files


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-vit", tiny_config())
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-wide", tiny_config(vision_cfg={"width": 96}))
    return "tiny-vit"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(open_clip_files, "is_reachable", lambda address: False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if hasattr(huggingface_hub.constants, name):
            monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "empty-cache"))


def state_dict(path: Path) -> None:
    torch.save(tiny_open_clip().state_dict(), path)


def training_checkpoint(path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in tiny_open_clip().state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)


def safetensors(path: Path) -> None:
    save_file(tiny_open_clip().state_dict(), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("weights.pt", state_dict),
        ("epoch_3.pt", training_checkpoint),
        ("weights.safetensors", safetensors),
        ("run:2:final.bin", state_dict),
        ("no_suffix", state_dict),
    ],
)
def test_an_architecture_with_a_checkpoint_file(
    architecture: str, tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    adapter = load_model(f"{architecture}:{tmp_path / name}")
    model = tiny_open_clip()
    assert adapter.kind == "open_clip"
    assert not adapter.module.training
    torch.testing.assert_close(
        adapter.encode_image(pixels_for(model)), load_model(model).encode_image(pixels_for(model))
    )
    adapter.save(tmp_path / "saved")
    assert load_model(tmp_path / "saved").identity() == adapter.identity()


def test_a_checkpoint_of_another_architecture_names_both(architecture: str, tmp_path: Path) -> None:
    state_dict(tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt does not load as tiny-wide: .*size mismatch"):
        load_model(f"tiny-wide:{tmp_path / 'weights.pt'}")


def test_a_damaged_checkpoint_is_named(architecture: str, tmp_path: Path) -> None:
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(InputError, match=rf"{name} does not load as tiny-vit"):
            load_model(f"{architecture}:{tmp_path / name}")


def test_a_checkpoint_that_would_run_code_is_refused(architecture: str, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"state_dict": Attack()}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="does not load"):
        load_model(f"{architecture}:{tmp_path / 'weights.pt'}")
    assert not (tmp_path / "ran").exists()


def test_weights_of_a_tag_set_activation_and_preprocessing(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dict(tmp_path / "weights.pt")
    tag = {"hf_hub": "some/where/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny-vit", {"mine": tag})
    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, cache_dir=None: str(tmp_path / "weights.pt"))
    monkeypatch.setattr(open_clip_files, "is_reachable", lambda address: True)

    adapter = load_model(f"{architecture}:mine")

    quick = load_model(tiny_open_clip(quick_gelu=True))
    pixels = pixels_for(quick.module)
    torch.testing.assert_close(adapter.encode_image(pixels), quick.encode_image(pixels))
    adapter.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    torch.testing.assert_close(again.encode_image(pixels), adapter.encode_image(pixels))
    torch.testing.assert_close(again.transform(picture()), adapter.transform(picture()))
    assert adapter.preprocess_cfg()["mean"] == (0.5, 0.5, 0.5)


def test_weights_that_cannot_be_fetched_are_named_at_once_with_the_remedy(no_network: None) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="'openai' of ViT-B-32 could not be fetched: ") as raised:
        load_model("ViT-B-32:openai")
    assert time.monotonic() - began < 60  # nobody has tried again and again
    message = str(raised.value)
    assert "https://huggingface.co/timm/vit_base_patch32_clip_224.openai" in message
    assert "ViT-B-32-quickgelu:/path/to/the/file" in message
    with pytest.raises(InputError, match=r"'hf-hub:nobody/nothing' could not be fetched: .*local-dir:DIR"):
        load_model("hf-hub:nobody/nothing")


def test_offline_mode_for_an_unreachable_hub_is_restored(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with open_clip_files.offline_if_unreachable():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not open_clip_files.is_reachable("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ViT-B-32", "would be random; pass 'ViT-B-32:openai'"),
        ("ViT-B-32:", "would be random"),
        ("ViT-B-23:openai", "no architecture 'ViT-B-23'; did you mean .*ViT-B-32"),
        ("ViT-B-32:opnai", "no weights 'opnai' for ViT-B-32; did you mean 'openai'.*laion400m_e31"),
        ("ViT-B-32:/nowhere/weights.pt", "no checkpoint '/nowhere/weights.pt' for ViT-B-32: no such file"),
        ("ViT-B-32:weights.safetensors", "no checkpoint 'weights.safetensors'"),
        ("/nowhere/model", "no model '/nowhere/model'; pass 'ViT-B-32:openai'"),
        ("local-dir:/nowhere/model", "there is no /nowhere/model/open_clip_config.json"),
        ("~nobody-of-this-name/model", "'~nobody-of-this-name/model' is not a path: "),
        ("local-dir:~nobody-of-this-name/model", "'~nobody-of-this-name/model' is not a path: "),
        ("ViT-B-32:~nobody-of-this-name/weights.pt", "'~nobody-of-this-name/weights.pt' is not a path: "),
        ("zzzzzzzz", "no model 'zzzzzzzz'; pass .*, a folder with a transformers CLIPModel"),
    ],
)
def test_a_string_that_names_no_model_says_what_would(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(text)


def test_folders_without_a_complete_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither open_clip_config.json"):
        load_model(tmp_path)
    config = {"model_cfg": tiny_config(), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds no weights"):
        load_model(tmp_path)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"does not load as .*Missing"):
        load_model(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(InputError, match="does not load"):
        load_model(f"local-dir:{tmp_path}")


def test_a_folder_of_transformers_is_to_be_given_without_the_prefix_of_open_clip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match=rf", but a model of transformers: pass '{tmp_path}' without 'local-dir:'"):
        load_model(f"local-dir:{tmp_path}")


def test_a_folder_loads_by_path_and_by_prefix(tmp_path: Path) -> None:
    model = tiny_open_clip()
    load_model(model).save(tmp_path)
    for name in (tmp_path, str(tmp_path), f"local-dir:{tmp_path}"):
        adapter = load_model(name)
        assert adapter.identity() == load_model(model).identity()
        assert torch.equal(adapter.tokenize(CAPTIONS), open_clip.tokenize(CAPTIONS, context_length=16))
        assert not adapter.module.training


def test_a_value_that_is_not_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="model is a int"):
        load_model(3)


def test_given_tokenizer_and_transform_win_and_an_adapter_keeps_its_own(tmp_path: Path) -> None:
    load_model(tiny_open_clip()).save(tmp_path)

    def tokenizer(captions: list[str]) -> torch.Tensor:
        return torch.full((len(captions), 16), 7)

    def transform(image: object) -> torch.Tensor:
        return torch.zeros(3, 16, 16)

    adapter = load_model(tmp_path, tokenizer=tokenizer, transform=transform, truncate=True)
    for found in (adapter, load_model(adapter)):
        assert found.tokenize(["a"]).unique().tolist() == [7]
        assert found.transform is transform
        assert found.truncate
    assert load_model(adapter).model_cfg == adapter.model_cfg
    for option in ("tokenizer", "transform"):
        with pytest.raises(InputError, match=f"{option} is a str"):
            load_model(tmp_path, **{option: "words"})


def test_a_device_copies_an_instance_and_never_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "pick_device", torch.device)  # the meta device stands for another one
    model = tiny_open_clip()
    assert load_model(model).module is model
    assert load_model(model, device="cpu").module is model
    moved = load_model(model, device="meta").module
    assert next(moved.parameters()).is_meta
    assert not next(model.parameters()).is_meta
    with pytest.raises(InputError, match="the CLIP has weights on the meta device"):
        load_model(moved, device="cpu")


def test_an_empty_string_does_not_name_the_folder_that_one_is_in(tmp_path, monkeypatch):
    load_model(tiny_open_clip()).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_model(".").kind == "open_clip"
    with pytest.raises(InputError, match="model is an empty string; pass"):
        load_model("")
