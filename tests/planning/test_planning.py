"""`cliperase-fast plan`."""

import json

import open_clip
import pytest
import torch

from cliperase_fast import cli
from cliperase_fast.planning.cost_model import step_cost
from cliperase_fast.planning.plan import count_model, step_of


def call(**options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return cli.main(["plan", *words])


def test_plan_prints_memory_and_time_as_computed(capsys):
    assert call(batch=65536, gpus=64, model="ViT-B-32", chunk=256) == 0
    told = capsys.readouterr().out
    assert "memory of a GPU" in told and "time of a step" in told and "Computed, not measured" in told
    assert "does not fit" not in told


def test_plan_prints_the_same_figures_as_json(capsys):
    assert cli.main(["plan", "--batch", "65536", "--gpus", "64", "--model", "ViT-B-32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cost = step_cost(step_of(batch=65536, gpus=64, model="ViT-B-32"))
    assert told["memory_bytes"] == {**cost.memory, "together": sum(cost.memory.values())}
    assert told["seconds"] == {**cost.seconds, "together": sum(cost.seconds.values())}
    assert told["fits"] == (told["memory_bytes"]["together"] <= told["gpu_memory_bytes"])
    assert (told["remedy"] is None) == told["fits"]


def test_a_step_that_does_not_fit_comes_with_a_remedy(capsys):
    assert call(batch=1 << 20, gpus=64, model="ViT-B-32") == 0
    assert "does not fit" in (told := capsys.readouterr().out) and "smaller --chunk" in told


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch": 1000}, "960 or 1024"),
        ({"gpus": 0}, "--gpus 0"),
        ({"model": "ViT-B-31"}, "ViT-B-32"),
        ({"gpu": "v100"}, "a100, h100, h200"),
        ({"chunk": 17}, "share of 16"),
        ({"zero": 4}, "--zero 4"),
        ({"efficiency": 0}, "--efficiency 0"),
        ({"gather": "some"}, "ring"),
        ({"precision": "fp8"}, "bf16"),
        ({"strip_mib": -1}, "strip"),
    ],
)
def test_wrong_input_is_an_error_that_names_it(capsys, wrong, says):
    assert call(**{"batch": 1024, "gpus": 64, "model": "ViT-B-32", **wrong}) == 2
    assert says in capsys.readouterr().err


def test_a_ring_needs_less_memory_and_zero_shards_the_student():
    usual, ring, zero = (
        step_cost(step_of(batch=1 << 20, gpus=512, model="ViT-B-32", **options))
        for options in ({}, {"gather": "ring"}, {"zero": 3})
    )
    assert ring.memory["loss"] < usual.memory["loss"] / 5
    assert zero.memory["student"] == pytest.approx(usual.memory["student"] / 512)


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "RN50"])
def test_activations_are_what_a_model_on_the_cpu_keeps_for_the_backward_pass(name):
    found, model, pairs = count_model(name, torch.float32), open_clip.create_model(name), 2
    of_weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_weights:
            saved[storage.data_ptr()] = storage
        return tensor

    size = model.visual.image_size
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        kept = [
            model.encode_image(torch.zeros(pairs, 3, *(size if isinstance(size, tuple) else (size, size)))),
            model.encode_text(torch.zeros(pairs, model.context_length, dtype=torch.int64)),
        ]
    assert found.width == kept[0].shape[1]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.activations == pytest.approx(sum(storage.nbytes() for storage in saved.values()) / pairs, rel=1e-3)


def test_arithmetic_counts_products_and_attention():
    width, layers, tokens = 256, 10, 77  # of the text tower of ViT-S-32-alt
    heads_and_mlp = 2 * tokens * width * width * (4 + 8) + 4 * tokens * tokens * width
    images = open_clip.get_model_config("ViT-S-32-alt")["vision_cfg"]
    patches = (images["image_size"] // images["patch_size"]) ** 2
    of_image = 2 * (patches + 1) * images["width"] ** 2 * 12 + 4 * (patches + 1) ** 2 * images["width"]
    ends = 2 * 3 * images["patch_size"] ** 2 * images["width"] * patches + 2 * (images["width"] + width) * width
    expected = layers * heads_and_mlp + images["layers"] * of_image + ends
    assert count_model("ViT-S-32-alt", torch.bfloat16).operations == expected
