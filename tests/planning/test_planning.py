"""`cliperase-fast plan`."""

import json

import pytest

from cliperase_fast import cli
from cliperase_fast.planning.cost_model import step_cost
from cliperase_fast.planning.plan import step_of


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
