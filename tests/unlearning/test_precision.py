"""precision="auto": bf16 only where the device is fast at it and the model hardly changes, recorded and kept."""

import math

import pytest
import torch
from tiny import QUICK, make_pairs, make_tiny_clip, split_pairs
from torch import nn

from cliperase_fast import InputError, unlearn
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import as_pairs
from cliperase_fast.distributed import SINGLE_PROCESS, Ranks
from cliperase_fast.models import load_model
from cliperase_fast.unlearning import precision
from cliperase_fast.unlearning.precision import choose_precision
from cliperase_fast.unlearning.runtime import Runtime
from cliperase_fast.unlearning.splits import Split

FORGET, RETAIN = split_pairs(make_pairs(), "red")
TOKENS = [torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1])]


@pytest.fixture
def fast(monkeypatch):
    """Decide what the device is said to be fast at."""

    def decide(able):
        monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: able)

    return decide


def run(output=None, **changes):
    return unlearn(make_tiny_clip(), FORGET, RETAIN, output_dir=output, **{**QUICK, "precision": "auto", **changes})


def choose(model, ranks=SINGLE_PROCESS):
    """Choose for a model of token captions."""
    pairs = as_pairs([(torch.full((3, 4, 4), float(n)), TOKENS[n % 2]) for n in range(4)], "pairs")
    settings = UnlearnConfig(precision="auto", device="cpu")
    runtime = Runtime.from_config(settings, False, ranks)
    return choose_precision(settings, load_model(model), Split(pairs, 2), runtime)


class Offset(nn.Module):
    """Has image features that survive only in a precision that resolves small differences at `offset`."""

    def __init__(self, offset):
        super().__init__()
        self.image, self.text = nn.Linear(48, 8), nn.Embedding(8, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.offset = offset
        nn.init.constant_(self.image.bias, offset)

    def encode_image(self, pixels):
        return self.image(pixels.flatten(1)) - self.offset

    def encode_text(self, tokens):
        return self.text(tokens).mean(1)


class WithoutHalf(Offset):
    """Fails in bf16."""

    def encode_image(self, pixels):
        found = super().encode_image(pixels)
        return found @ torch.eye(8) if found.dtype == torch.float32 else found.view(torch.float32)


class OneIsSlow(Ranks):
    """The first of two ranks; the second has no fast bfloat16."""

    def gather_results(self, work):
        return [work(), False]


def test_bf16_is_chosen_where_it_is_fast_and_the_scores_stay(fast, tmp_path, caplog):
    fast(True)
    caplog.set_level("INFO", "cliperase_fast")
    result = run(tmp_path / "run")
    assert result.config.precision == result.record["config"]["precision"] == "bf16"
    assert result.record["precision"]["requested"] == "auto"
    assert "fast bfloat16" in result.record["precision"]["reason"]
    assert any("chose bf16" in note for note in result.record["notes"])
    assert "precision bf16" in caplog.text
    given = run(precision="bf16")
    assert [line["total"] for line in result.history if "total" in line] == [
        line["total"] for line in given.history if "total" in line
    ]
    assert given.record["precision"] == {"requested": "bf16", "used": "bf16", "reason": ""}


def test_float32_is_chosen_elsewhere_and_a_run_goes_on_only_in_its_own_precision(fast, tmp_path):
    fast(False)
    result = run(tmp_path, epochs=1)
    assert result.config.precision == "fp32"
    assert "no fast bfloat16" in result.record["precision"]["reason"]
    assert run(tmp_path, epochs=1, resume=True).record["after"] == result.record["after"]
    fast(True)
    with pytest.raises(InputError, match="precision 'fp32' -> 'bf16'"):
        run(tmp_path, epochs=1, resume=True)
    run(tmp_path, epochs=1, resume=True, precision="fp32")


def test_a_model_that_needs_float32_keeps_it(fast):
    fast(True)
    torch.manual_seed(0)
    assert choose(Offset(0.0)).used == "bf16"
    assert choose(Offset(512.0)).used == "fp32"
    assert "away from those in float32" in choose(Offset(512.0)).reason
    assert "does not run in bf16" in choose(WithoutHalf(0.0)).reason


def test_scores_that_change_keep_float32(fast, monkeypatch):
    fast(True)
    torch.manual_seed(0)
    found = iter([{"association": 0.50}, {"association": 0.52}])
    missing = dict.fromkeys(("zero_shot_top1", "image_to_text_r@1"))
    monkeypatch.setattr(precision, "score", lambda *given, **named: {"all": {**missing, **next(found)}})
    assert choose(Offset(0.0)).reason == "association is 0.500 in float32 and 0.520 in bf16, more than 0.01 apart"


def test_a_cosine_may_change_less_at_a_large_logit_scale(fast, monkeypatch):
    fast(True)
    missing = dict.fromkeys(("zero_shot_top1", "image_to_text_r@1"))
    for scale, used in ((20.0, "bf16"), (104.0, "fp32")):
        torch.manual_seed(0)
        model = Offset(0.0)
        model.logit_scale.data.fill_(math.log(scale))
        found = iter([{"association": 0.500}, {"association": 0.505}])
        monkeypatch.setattr(
            precision, "score", lambda *given, _found=found, **named: {"all": {**missing, **next(_found)}}
        )
        chosen = choose(model)
        assert chosen.used == used
    assert chosen.reason.endswith("in bf16, more than 0.0025 apart")


def test_one_slow_rank_decides_for_all(fast):
    fast(True)
    assert choose(Offset(0.0), OneIsSlow()).used == "fp32"


def test_the_command_line_takes_auto():
    words = [
        "unlearn",
        "--model",
        "m",
        "--data",
        "demo",
        "--forget",
        "class:one",
        "--output",
        "o",
        "--precision",
        "auto",
    ]
    assert make_parser().parse_args(words).precision == "auto"
