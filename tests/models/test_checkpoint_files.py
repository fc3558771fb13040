"""Checkpoints as users have them: prefixes, containers, other data beside the weights, TorchScript, damage."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import factory
from safetensors.torch import load_file, save_file
from tiny_models import pixels_for, tiny_clip, tiny_config, tiny_open_clip
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model
from cliperase_fast.models.checkpoint_files import read_checkpoint

SMALL: dict[str, Any] = {"text_cfg": {"vocab_size": 60}}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", tiny_config(**SMALL))


@pytest.fixture(scope="module")
def state() -> State:
    return tiny_open_clip(**SMALL).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


class Trainer:
    """A class that no other program has."""

    def __init__(self) -> None:
        self.settings = {"rate": 1}


def inner(state: State, wrapper: str) -> State:
    return {name.replace("visual.", f"visual.{wrapper}."): tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "module": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled in parallel": lambda s: prefixed(s, "module._orig_mod."),
    "parallel in compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "a compiled tower": lambda s: inner(s, "_orig_mod"),
    "a parallel tower": lambda s: inner(s, "module"),
    "lightning": lambda s: {"state_dict": prefixed(s, "model.clip."), "pytorch-lightning_version": "2.6"},
    "model": lambda s: {"model": s, "epoch": 1},
    "model_state_dict": lambda s: {"model_state_dict": prefixed(s, "module."), "optimizer_state_dict": {"state": {}}},
    "deepspeed": lambda s: {"module": s, "dp_world_size": 2},
    "nested": lambda s: {"checkpoint": {"student": {"state_dict": s}}},
    "numpy scalars": lambda s: {"state_dict": s, "epoch": np.int64(3), "best": np.float64(0.5), "at": np.arange(3)},
    "a namespace": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1, path=Path("x"))},
    "a class of the trainer": lambda s: {"state_dict": s, "trainer": Trainer(), "kind": Trainer},
    "an optimizer": lambda s: {"state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "position ids": lambda s: {**s, "text.transformer.embeddings.position_ids": torch.arange(4)[None]},
    "a scale of one element": lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1, 1)},
    "double precision": lambda s: {name: tensor.double() for name, tensor in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_in_every_form(tmp_path: Path, state: State, form: str) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(FORMS[form](state), path)
    loaded = load_model(f"tiny:{path}").module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_safetensors_and_older_files_and_folders_may_have_prefixes(tmp_path: Path, state: State) -> None:
    save_file(prefixed(state, "_orig_mod."), tmp_path / "weights.safetensors")
    torch.save({"model": prefixed(state, "module.")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_model(tiny_open_clip(**SMALL)).save(tmp_path / "folder")
    weights = tmp_path / "folder" / "open_clip_model.safetensors"
    save_file(prefixed(load_file(weights), "module."), weights)
    for name in (f"tiny:{tmp_path}/weights.safetensors", f"tiny:{tmp_path}/old.pt", f"local-dir:{tmp_path}/folder"):
        loaded = load_model(name).module.state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_averaged_weights_beside_are_left_and_that_is_said(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    for content in (
        {"state_dict": state, "state_dict_ema": averaged},
        {"state_dict": prefixed(state, "model.") | prefixed(averaged, "ema_model.")},
        {**state, **prefixed(averaged, "teacher.")},
    ):
        caplog.clear()
        torch.save(content, tmp_path / "weights.pt")
        with caplog.at_level(logging.WARNING, "cliperase_fast"):
            loaded = load_model(f"tiny:{tmp_path}/weights.pt").module.state_dict()
        assert torch.equal(loaded["logit_scale"], state["logit_scale"])
        assert "holds the model 2 times" in caplog.text
    torch.save({"ema": averaged}, tmp_path / "weights.pt")
    loaded = load_model(f"tiny:{tmp_path}/weights.pt").module.state_dict()
    assert torch.equal(loaded["logit_scale"], averaged["logit_scale"])


def test_two_models_of_equal_right_are_named(tmp_path: Path, state: State) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"first": state, "second": other}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"holds the model 2 times \('first', 'second'\)"):
        load_model(f"tiny:{tmp_path}/weights.pt")


def changed(state: State, **tensors: Any) -> State:
    return {name: tensors.get(name, tensor) for name, tensor in state.items()}


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "a whole module": (lambda s: tiny_open_clip(**SMALL), r"whole pickled model .*torch\.save\(model\.state_dict\(\)"),
    "a module in a dictionary": (lambda s: {"model": tiny_open_clip(**SMALL)}, "whole pickled model"),
    "images of another size": (
        lambda s: {**s, "visual.positional_embedding": torch.zeros(5, 48)},
        r"images of another size .*\[5, 48\] in the checkpoint, \[17, 48\]",
    ),
    "another context": (
        lambda s: {**s, "positional_embedding": torch.zeros(8, 32)},
        r"another context length: .*\[8, 32\] in the checkpoint, \[16, 32\]",
    ),
    "missing weights": (
        lambda s: {name: tensor for name, tensor in s.items() if "ln_final" not in name},
        r"lacks 2 of the \d+ weights \(Missing: 'ln_final.weight'",
    ),
    "missing weights under a prefix": (
        lambda s: {"model": {f"net.{name}": tensor for name, tensor in s.items() if "ln_final" not in name}},
        r"lacks 2 of the \d+ weights under 'model.net'",
    ),
    "weights too many": (lambda s: {**s, "text_decoder.weight": torch.zeros(2)}, "also holds 'text_decoder.weight'"),
    "names of transformers": (lambda s: tiny_clip().state_dict(), r"names are those of a transformers CLIPModel"),
    "LoRA alone": (
        lambda s: {"base_model.model.visual.x.lora_A.weight": torch.zeros(2, 2)},
        r"merge_and_unload\(\)",
    ),
    "an optimizer alone": (lambda s: {"step": 3, "lr": 0.1}, "holds no named tensors .*step"),
    "a list": (lambda s: [1, 2], "it is a list"),
    "nothing": (lambda s: {}, "it is empty"),
    "numpy arrays": (lambda s: {"model": {name: t.numpy() for name, t in s.items()}}, r"torch\.from_numpy\(array\)"),
    "complex values": (lambda s: {**s, "logit_scale": s["logit_scale"].to(torch.complex64)}, "complex64 values"),
    "integers": (lambda s: {**s, "ln_final.weight": s["ln_final.weight"].to(torch.int8)}, "int8 values .* quantized"),
    "None": (lambda s: None, "it is a NoneType"),
    "another model": (lambda s: nn.Linear(2, 2).state_dict(), "none of its 2 tensors has a name"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path, state: State, form: str) -> None:
    make, says = REFUSED[form]
    path = tmp_path / "weights.pt"
    torch.save(make(state), path)
    with pytest.raises(InputError, match=says) as raised:
        load_model(f"tiny:{path}")
    assert f"the checkpoint {path} does not load as tiny: " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_classes_in_an_older_file_are_left_out(tmp_path: Path, state: State) -> None:
    content = {"state_dict": state, "epoch": np.int64(3), "args": argparse.Namespace(lr=1), "trainer": Trainer()}
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    loaded = load_model(f"tiny:{tmp_path}/old.pth").module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    torch.save(tiny_open_clip(**SMALL), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"without running code \(it holds open_clip\.model\.CLIP"):
        load_model(f"tiny:{tmp_path}/old.pth")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
MISTAKEN: dict[str, tuple[bytes, str]] = {
    "pointer.safetensors": (LFS, "git lfs pull"),
    "pointer.npz": (LFS, "big_vision"),
    "page.safetensors": (b"\n<!DOCTYPE html><html>", "web page; .*/resolve/"),
    "page.pt": (b"<html><body>", "web page"),
    "empty.safetensors": (b"", "it is empty"),
    "packed.pt": (b"\x1f\x8b\x08\x00\x00", "gzip"),
    "pickled.pt": (pickle.dumps({"a": 1}), "plain pickle"),
    "array.pt": (b"\x93NUMPY\x01\x00", "NumPy array"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_files_mistaken_for_checkpoints_are_named(tmp_path: Path, name: str) -> None:
    content, says = MISTAKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} does not load as tiny: .*{says}"):
        load_model(f"tiny:{tmp_path / name}")


def test_a_file_is_read_by_its_content_not_its_name(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "weights.safetensors")
    save_file(state, tmp_path / "weights.bin")
    for name in ("weights.safetensors", "weights.bin"):
        loaded = load_model(f"tiny:{tmp_path / name}").module.state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_a_folder_passed_as_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder; name the file .* dcp_to_torch"):
        load_model(f"tiny:{tmp_path}")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, state: State, zipped: bool) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": state, "x": Attack(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    try:
        load_model(f"tiny:{path}")
    except InputError as error:
        assert "torch.save(model.state_dict(), PATH)" in str(error)
    assert not (tmp_path / "ran").exists()


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x.float()).half() * self.logit_scale.exp()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_torchscript_archive_is_read_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = Scripted().eval().half()
    model.visual.float()
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.zeros(2, 3))
    torch.jit.save(scripted, tmp_path / "model.pt")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the archive was loaded as a program")

    monkeypatch.setattr(torch.jit, "load", refuse)
    read = read_checkpoint(tmp_path / "model.pt", "tiny")
    expected = model.state_dict()
    assert set(read) == set(expected)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


class Holder(nn.Module):
    """Parameters under the names of a CLIP model, as in the archives that OpenAI published."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(tensor.half()))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(16))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_openais_archives_load_as_an_architecture_with_quick_gelu_only(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-quickgelu", tiny_config(**SMALL, quick_gelu=True))
    torch.jit.save(torch.jit.trace(Holder(state), torch.zeros(1), check_trace=False), tmp_path / "model.pt")
    loaded = load_model(f"tiny-quickgelu:{tmp_path}/model.pt").module.state_dict()
    assert all(torch.equal(loaded[name], tensor.half().float()) for name, tensor in state.items())
    with pytest.raises(InputError, match=rf"such as 'tiny-quickgelu:{tmp_path}/model\.pt'"):
        load_model(f"tiny:{tmp_path}/model.pt")


def test_damaged_cut_short_and_inflated_files_are_one_line(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "whole.pt")
    save_file(state, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    raw = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10_000_000))
    says = {
        "cut.pt": "cut short",
        "cut.safetensors": "cut short",
        "text.pt": "git lfs pull",
        "bomb.pt": "is compressed",
    }
    for name in ("cut.pt", "cut.safetensors", "empty.pt", "text.pt", "pickle.pt", "bomb.pt"):
        with pytest.raises(InputError, match=f"{name} does not load as tiny: .*{says.get(name, '')}") as raised:
            load_model(f"tiny:{tmp_path / name}")
        assert "\n" not in str(raised.value)


def test_a_transformers_folder_may_have_prefixes_shards_and_older_files(tmp_path: Path) -> None:
    model = tiny_clip()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    pixels = pixels_for(model)
    expected = load_model(model).encode_image(pixels)

    def assert_loads() -> None:
        torch.testing.assert_close(load_model(tmp_path).encode_image(pixels), expected)

    save_file(prefixed(state, "module._orig_mod."), weights)
    assert_loads()
    save_file({**state, "logit_scale": state["logit_scale"].reshape(1)}, weights)
    assert_loads()
    weights.unlink()
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "pytorch_model.bin")
    assert_loads()
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(state)
    parts = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in parts.items() for name in own}}))
    assert_loads()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"names the shard 'b\.safetensors', which is missing"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(InputError, match="is not a file of its folder"):
        load_model(tmp_path)
