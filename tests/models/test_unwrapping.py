"""Models inside wrappers: every nesting is opened, and the given model is not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_models import TwoTowers, pixels_for, tiny_clip, tiny_open_clip
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPModel

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model

SMALL: dict[str, Any] = {"text_cfg": {"vocab_size": 60}}
Wrap = Callable[[Any], Any]


def peft_wrapped(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def compiled_encoder(model: Any) -> nn.Module:
    model.encode_image = torch.compile(model.encode_image)
    return model


def compiled_tower(model: Any) -> nn.Module:
    model.visual = nn.DataParallel(torch.compile(model.visual))
    return model


def checkpointed_blocks(model: Any) -> nn.Module:
    blocks = model.visual.transformer.resblocks
    blocks[0] = checkpoint_wrapper(blocks[0])
    return model


WRAPPERS: dict[str, Wrap] = {
    "parallel of compiled": lambda m: nn.DataParallel(torch.compile(m)),
    "compiled of parallel": lambda m: torch.compile(nn.DataParallel(m)),
    "three deep": lambda m: torch.compile(nn.DataParallel(torch.compile(nn.DataParallel(m)))),
    "averaged": AveragedModel,
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize(
    "make", [lambda: tiny_open_clip(**SMALL), tiny_clip, TwoTowers], ids=["open_clip", "hf", "own"]
)
def test_every_nesting_of_wrappers_is_opened(how: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    adapter = load_model(WRAPPERS[how](model))
    assert type(adapter.module) is type(model)
    assert adapter.identity() == load_model(model).identity()


@pytest.mark.parametrize("change", [compiled_encoder, compiled_tower, checkpointed_blocks])
def test_wrappers_inside_the_model_are_left_out_of_a_copy(tmp_path: Path, change: Wrap) -> None:
    plain = tiny_open_clip(**SMALL)
    model = change(tiny_open_clip(**SMALL))
    names, parts = list(model.state_dict()), [type(part) for part in model.modules()]
    adapter = load_model(model)
    assert adapter.identity() == load_model(plain).identity()
    assert adapter.module.logit_scale is model.logit_scale  # the tensors are shared, not copied
    adapter.save(tmp_path / "model")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'model'}")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in again.state_dict().items())
    twin = adapter.clone()
    with torch.no_grad():
        twin.module.visual.conv1.weight.zero_()
    assert not torch.equal(twin.encode_image(pixels_for(plain)), adapter.encode_image(pixels_for(plain)))
    assert names == list(model.state_dict()) and parts == [type(part) for part in model.modules()]


def test_what_accelerate_puts_in_the_place_of_forward_is_taken_off(tmp_path: Path) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model: Any = tiny_clip()
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)  # as Accelerator.prepare does under mixed precision
    adapter = load_model(model)
    assert "forward" not in vars(adapter.module) and "forward" in vars(model)
    adapter.clone().save(tmp_path / "model")
    assert isinstance(CLIPModel.from_pretrained(tmp_path / "model"), CLIPModel)


def test_a_peft_model_in_other_wrappers_is_opened() -> None:
    adapter = load_model(nn.DataParallel(torch.compile(peft_wrapped(torch.compile(tiny_clip())._orig_mod))))
    assert type(adapter.module) is CLIPModel
    assert adapter.identity() == load_model(tiny_clip()).identity()


def test_a_wrapper_that_holds_itself_ends_the_search() -> None:
    wrapper = nn.DataParallel(tiny_open_clip(**SMALL))
    object.__setattr__(wrapper, "_modules", {"module": wrapper})
    with pytest.raises(InputError, match="DataParallel is none of the supported models"):
        load_model(wrapper)


def test_a_module_that_holds_a_clip_model_names_the_attribute() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.head = nn.DataParallel(tiny_open_clip(**SMALL)), nn.Linear(2, 2)

    with pytest.raises(InputError, match=r"Task is not a CLIP model but holds one; pass .* model\.student"):
        load_model(Task())


def test_a_method_that_keeps_the_model_is_refused_before_training() -> None:
    model: Any = TwoTowers()
    encode = model.encode_image
    model.encode_image = lambda pixels: encode(pixels)
    with pytest.raises(InputError, match=r"encode_image of the TwoTowers was replaced .*\(del model\.encode_image\)"):
        load_model(model).check_saveable()


@pytest.mark.parametrize("make", [tiny_open_clip, tiny_clip])
def test_a_model_built_under_inference_mode_is_copied_so_that_it_can_be_trained(make: Any) -> None:
    with torch.inference_mode():
        model = make()
    adapter = load_model(model)
    adapter.check_saveable()
    adapter.encode_image(pixels_for(model)).sum().backward()
    assert any(parameter.grad is not None for parameter in adapter.module.parameters())
    assert all(parameter.is_inference() for parameter in model.parameters())


def test_a_torchscript_program_is_refused_with_the_way_to_load_its_weights() -> None:
    with pytest.raises(InputError, match=r"TorchScript program.*torch\.jit\.save\(model, 'clip\.pt'\)"):
        load_model(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))
