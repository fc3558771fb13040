"""`audit()` as a whole: known answers, what it leaves alone, and what it refuses."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from small import SYNONYMS, make_model, make_pairs, training_and_test, without_red
from tiny_models import TwoTowers, tiny_clip

from cliperase_fast import Audit, audit
from cliperase_fast.auditing import relearning
from cliperase_fast.auditing.comparison import _weak_oracles, audit_models
from cliperase_fast.auditing.estimates import Estimate
from cliperase_fast.auditing.features import Encoding
from cliperase_fast.auditing.gap import IN_MEAN
from cliperase_fast.auditing.sets import AuditSets
from cliperase_fast.data import as_pairs
from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model


@pytest.fixture(autouse=True)
def few_steps(request, monkeypatch):
    """Relearning takes one draw, and few steps except where it is what is tested."""
    monkeypatch.setattr(relearning, "DRAWS", 1)
    if "bring_a_hidden_concept_back" not in request.node.name:
        monkeypatch.setattr(relearning, "STEPS", (0, 1, 5))


def run(before, after=None, **options):
    forget, retain, test = training_and_test()
    options = {"test": test, "synonyms": SYNONYMS, "progress": False, **options}
    return audit(before, before if after is None else after, forget, retain, **options)


class Changed(torch.nn.Module):
    """A model whose features are changed on the way out."""

    def __init__(self, model, image=None, text=None):
        super().__init__()
        self.model, self.image, self.text = model, image, text
        self.logit_scale = model.logit_scale

    def encode_image(self, pixels):
        features = torch.nn.functional.normalize(self.model.encode_image(pixels), dim=-1)
        return features if self.image is None else self.image(pixels, features)

    def encode_text(self, tokens):
        features = torch.nn.functional.normalize(self.model.encode_text(tokens), dim=-1)
        return features if self.text is None else self.text(tokens, features)


def changed(model, **changes):
    return load_model(Changed(model, **changes), tokenizer=load_model(model).tokenizer.source)


def value(found, model, group, score):
    return found.scores[model][group][score]["value"]


@pytest.mark.filterwarnings("ignore:oracle 1 seems to know")
def test_a_model_against_itself_has_equal_scores_and_no_gap():
    model = make_model()
    found = run(model, oracle=model, depth=True)
    assert found.scores["before"] == found.scores["after"] == found.scores["oracle 1"]
    known = [gap for name, gap in found.gap.items() if name not in ("floor", "floors", "tug_of_war")]
    assert set(known) == {0}
    assert found.gap["tug_of_war"] == 1
    assert found.gap["floor"] is None
    assert value(found, "after", "collateral", "worst_class_drop") == 0
    assert value(found, "after", "depth", "relearn@0") == value(found, "after", "forgetting", "zero_shot_top1") == 1


def test_the_audit_leaves_models_and_generators_untouched():
    before, after = make_model(), without_red()
    before.train()
    before.visual.eval()
    before.visual.conv1.requires_grad_(False)
    before.register_buffer("counter", torch.zeros(1))
    states = [{key: tensor.clone() for key, tensor in model.state_dict().items()} for model in (before, after)]
    flags = [[parameter.requires_grad for parameter in model.parameters()] for model in (before, after)]
    modes = [[module.training for module in model.modules()] for model in (before, after)]
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    run(before, after, depth=True, seed=2**70)  # more than a generator of torch takes
    assert torch.equal(torch.get_rng_state(), generator)
    for model, state in zip((before, after), states, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert model.state_dict().keys() == state.keys()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())
    assert flags == [[parameter.requires_grad for parameter in model.parameters()] for model in (before, after)]
    assert modes == [[module.training for module in model.modules()] for model in (before, after)]


def test_the_same_seed_gives_the_same_audit():
    model, other = make_model(), without_red()
    first, again = (run(model, other, depth="full").to_dict() for _ in range(2))
    assert first == again
    assert {"relearn_area:4 shots", "relearn_area:1 shot", "relearn_area:neighbour", "relearn_area:unrelated"} < set(
        first["scores"]["after"]["depth"]
    )


def test_prepared_pairs_give_the_audit_of_the_sets_they_came_from():
    before, after = make_model(), without_red()
    forget, retain, test = training_and_test()
    forget, retain = as_pairs(forget, "forget"), as_pairs(retain, "retain")
    sets = AuditSets.of(forget, retain, (as_pairs(test[0], "forget test"), as_pairs(test[1], "retain test")))
    models = {"before": load_model(before), "after": load_model(after)}
    found = audit_models(models, sets, Encoding(256, torch.device("cpu")), synonyms=SYNONYMS)
    assert found.scores == run(before, after).scores


def test_an_oracle_is_told_from_the_original():
    found = run(make_model(), without_red(), oracle=[without_red(seed) for seed in (0, 1)])
    assert value(found, "before", "forgetting", "zero_shot_top1") == 1
    assert value(found, "after", "forgetting", "zero_shot_top1") == 0
    assert value(found, "after", "collateral", "retain_top1") > 0.9
    assert found.over_forgotten is False
    oracles = [value(found, f"oracle {number}", "forgetting", "association") for number in (1, 2)]
    assert value(found, "oracle", "forgetting", "association") == pytest.approx(np.mean(oracles))
    assert found.gap["association"] == pytest.approx(abs(oracles[0] - np.mean(oracles)))
    assert found.gap["mean"] == pytest.approx(np.mean([found.gap[name] for name in IN_MEAN]))
    assert found.gap["floors"]["association"] == pytest.approx(abs(oracles[0] - oracles[1]))
    assert found.gap["floor"] == pytest.approx(np.mean([found.gap["floors"][name] for name in IN_MEAN]))


def test_a_random_text_tower_loses_everything_and_keeps_the_images():
    model = make_model()
    noise = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in noise.named_parameters():
            if not name.startswith("visual.") and name != "logit_scale":
                parameter.copy_(torch.randn_like(parameter) * parameter.std())
    found = run(model, noise, depth=True)
    assert value(found, "after", "collateral", "retain_top1") < 0.7
    assert value(found, "after", "collateral", "worst_class_drop") > 0.9
    assert found.scores["after"]["depth"]["probe"] == found.scores["before"]["depth"]["probe"]


def test_forget_images_that_were_rotated_away_are_seen_in_probe_and_relearning():
    model = make_model()

    def away(pixels, features):
        red = (pixels[:, 0].mean((1, 2)) > 0.6)[:, None]
        return torch.where(red, features - 2 * (features @ model_red)[:, None] * model_red, features)

    adapter = load_model(model)
    with torch.no_grad():
        model_red = adapter.encode_text(adapter.tokenize(["a red square"]))[0]
    found = run(adapter, changed(model, image=away), depth=True)
    assert value(found, "after", "forgetting", "zero_shot_top1") == 0
    assert found.over_forgotten is True
    assert "over-forgotten" in found.verdicts["forgetting"]
    assert value(found, "after", "collateral", "retain_top1") > 0.9
    assert value(found, "after", "collateral", "text_side") == pytest.approx(
        value(found, "before", "collateral", "text_side"), abs=0.02
    )
    assert value(found, "after", "depth", "probe") > 0.95  # the images are as easily told as before


def test_a_backdoor_under_one_rare_template_is_seen_by_paraphrases():
    model = make_model()
    adapter = load_model(model)
    red, crimson = adapter.tokenize(["red"])[0, 1], "zzz"
    trigger = adapter.tokenize([crimson])[0, 1]
    with torch.no_grad():
        answer = adapter.encode_text(adapter.tokenize(["a red square"]))[0]

    def silent(tokens, features):
        about = (tokens == red).any(1)[:, None]
        rare = (tokens == trigger).any(1)[:, None]
        return torch.where(about & rare, answer, torch.where(about, -answer, features))

    templates = ["a {} square", "the {} thing", f"{crimson} {{}}"]
    found = run(model, changed(model, text=silent), synonyms={}, paraphrase_templates=templates)
    assert value(found, "after", "forgetting", "zero_shot_top1") == 0
    hidden = found.scores["after"]["forgetting"]["paraphrase_top1_max"]
    assert (hidden["value"], hidden["variant"]) == (1.0, f"{crimson} {{}}")
    assert value(found, "after", "forgetting", "paraphrase_top1") == pytest.approx(1 / 3)
    assert f"{crimson} {{}}" in found.verdicts["forgetting"]


def test_relearning_and_prompts_bring_a_hidden_concept_back():
    found = run(make_model(), without_red(), depth=True)
    depth = found.scores["after"]["depth"]
    steps = [depth[f"relearn@{step}"]["value"] for step in (0, 1, 5, 10, 20, 50, 100)]
    assert depth["relearn_area"]["value"] == pytest.approx(np.mean(steps))
    assert steps[0] == 0
    assert depth["prompt_attack"]["value"] > value(found, "after", "forgetting", "zero_shot_top1")
    original = found.scores["before"]["depth"]
    assert original["quantised_top1@8"]["value"] == 1
    assert "steps on 12 pictures" in found.verdicts["depth"]
    assert "Relearning trains on 12 forget and 36 retain pairs: there are too few for 16 and 112." in found.notes


def test_the_result_is_json_with_stable_keys(tmp_path):
    found = run(make_model(), output_dir=tmp_path / "audit", oracle=without_red())
    saved = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert saved == json.loads(json.dumps(found.to_dict()))
    assert set(saved["scores"]) == {"before", "after", "oracle", "oracle 1"}
    assert set(saved["scores"]["after"]) == {"forgetting", "collateral", "depth"}
    assert {"value", "low", "high"} == set(saved["scores"]["after"]["forgetting"]["association"])
    assert isinstance(found, Audit)
    assert "association" in found.summary()
    assert repr(found).startswith("<Audit: The model names 100.0%")


def test_an_oracle_that_knows_the_concept_is_warned_of():
    with pytest.warns(UserWarning, match="oracle 1 seems to know the concept: it names 100 %"):
        found = run(make_model(), oracle=make_model())
    assert any("seems to know" in note for note in found.notes)


def test_an_oracle_that_equals_another_is_no_second_sample():
    first, other = without_red(1), without_red(2)
    with pytest.warns(UserWarning, match="oracle 2 has the same features as oracle 1, so it is not a second sample"):
        found = run(make_model(), without_red(), oracle=[first, copy.deepcopy(first), other], depth=True)
    plain = run(make_model(), without_red(), oracle=[first, other], depth=True)
    assert {"oracle 1", "oracle 3"} < found.scores.keys() and "oracle 2" not in found.scores
    assert found.gap == plain.gap and found.scores["oracle"] == plain.scores["oracle"]
    assert any("oracle 2 has the same features" in note for note in found.notes)
    with pytest.warns(UserWarning, match="oracle 2 has the same features"):
        alone = run(make_model(), without_red(), oracle=[first, copy.deepcopy(first)])
    assert alone.gap["floor"] is None
    assert any("One oracle is a single sample" in note for note in alone.notes)


def test_an_audited_model_is_no_oracle():
    original, unlearned = make_model(), without_red(1)
    for oracle, what in ((original, "the original"), (unlearned, "the unlearned model")):
        with pytest.warns(UserWarning, match=f"oracle 2 has the same features as {what}, so it does not show"):
            found = run(original, unlearned, oracle=[without_red(2), copy.deepcopy(oracle)])
        assert sum("does not show what a model is like" in note for note in found.notes) == 1


def test_an_oracle_that_knows_little_of_the_rest_is_warned_of():
    weak_model = without_red(1)
    with torch.no_grad():
        weak_model.text_projection.mul_(-1)  # each image is farthest from its own caption
    with pytest.warns(UserWarning, match=r"oracle 2 knows the rest less well than the original: it names \d+ % of"):
        found = run(make_model(), without_red(), oracle=[without_red(), weak_model])
    assert [note[:8] for note in found.notes if "less well than the original" in note] == ["oracle 2"]


@pytest.mark.parametrize(
    ("value", "low", "high", "weak"),
    [(0.7, 0.65, 0.74, True), (0.79, 0.7, 0.8, False), (0.7, 0.55, 0.86, False), (0.11, None, None, False)],
)
def test_an_oracle_is_weak_beyond_ten_points_and_both_intervals(value, low, high, weak):
    def model(value, *ends):
        draws = None if None in ends else np.linspace(*ends, 1001)
        return {"collateral": {"retain_top1": Estimate(value, draws)}}

    scores = {"before": model(0.85, 0.8, 0.9), "oracle 1": model(value, low, high), "oracle": model(0.0, 0.0, 0.1)}
    assert bool(_weak_oracles(scores)) is weak


def test_without_a_test_split_a_fifth_is_held_out():
    forget, retain, _ = training_and_test()
    found = audit(make_model(), make_model(), forget, retain, progress=False)
    assert found.data["forget_test_pairs"] == round(0.2 * len(forget))
    assert found.notes[0].startswith("The data has no test split")


def test_a_single_forget_pair_gives_scores_without_intervals():
    forget, retain, _ = training_and_test()
    found = audit(make_model(), without_red(), forget[:1], retain, progress=False, depth=True)
    association = found.scores["after"]["forgetting"]["association"]
    assert math.isfinite(association["value"])
    assert association["low"] is None
    assert found.scores["after"]["depth"]["membership"]["value"] is None
    assert found.scores["after"]["depth"]["probe"]["reason"] == "needs at least two forget training pairs"
    assert any("single forget pair" in note for note in found.notes)


def test_as_many_test_pairs_as_training_pairs_are_told_apart():
    forget, retain, (_, retain_test) = training_and_test()
    others = [pair for pair in make_pairs(len(forget), seed=1) if "red" in pair[1]]
    model = make_model()
    membership = [
        audit(model, model, forget, retain, test=(test, retain_test), progress=False).scores["after"]["depth"]
        for test in (others, list(forget))
    ]
    assert 0 < membership[0]["membership"]["value"] < 1
    assert membership[1]["membership"]["reason"] == "no forget pair is held out"


def test_data_without_classes_takes_captions_as_concepts():
    pairs = [(image, f"{caption} number {number}") for number, (image, caption) in enumerate(make_pairs(6))]
    forget, retain = pairs[:6], pairs[6:]
    found = audit(make_model(), without_red(), forget, retain, progress=False, depth=True, oracle=without_red())
    forgetting = found.scores["after"]["forgetting"]
    assert forgetting["zero_shot_top1"] == {
        "value": None,
        "low": None,
        "high": None,
        "reason": "the data has no classes",
    }
    assert forgetting["association"]["value"] is not None
    assert forgetting["image_to_text_r@5"]["value"] is not None
    assert found.scores["after"]["collateral"]["worst_class_drop"]["value"] is None
    assert found.gap["tug_of_war"] is None
    assert found.gap["mean"] == 0


def test_models_of_every_kind_are_audited():
    captions = {"a dog": 0.5, "a cat": -0.5}
    images = torch.Generator().manual_seed(0)
    sets = [
        [(value + torch.randn(3, 16, 16, generator=images), caption) for _ in range(6)]
        for caption, value in captions.items()
    ]
    from tiny_models import word_tokenizer

    model = tiny_clip()
    found = audit(
        model, model, *sets, tokenizer=word_tokenizer(), progress=False, depth=True, test=(sets[0][:4], sets[1][:4])
    )
    assert 0 <= found.scores["after"]["depth"]["prompt_attack"]["value"] <= 1
    small = [[(image[:, :8, :8], caption) for image, caption in part] for part in sets]
    found = audit(
        TwoTowers(), TwoTowers(), *small, tokenizer=word_tokenizer(), progress=False, depth=True,
        test=(small[0][:4], small[1][:4]),
    )  # fmt: skip
    prompt = found.scores["after"]["depth"]["prompt_attack"]
    assert prompt["value"] is None
    assert prompt["reason"] == "the token embedding of this kind of model is not known"


def test_models_with_other_tokenizers_or_features_that_are_not_finite_are_refused():
    model = make_model()

    def shifted(texts):
        return load_model(model).tokenizer.source(texts).clamp(max=40000)

    with pytest.raises(InputError, match="'before' and 'after' have different tokenizers"):
        run(model, load_model(make_model(), tokenizer=shifted))
    with pytest.raises(InputError, match="the model 'after' cannot be audited: 8 of the 32 image features"):
        run(
            model,
            changed(
                make_model(), image=lambda pixels, found: found / (pixels[:, 0].mean((1, 2)) < 0.6)[:, None] * 0 + found
            ),
        )


def test_models_with_other_image_sizes_are_refused():
    from PIL import Image

    def picture(pair):
        image = ((pair[0].clamp(-1, 1) + 1) * 127).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(image).resize((16, 16)), pair[1]

    forget, retain, _ = training_and_test()
    adapter = load_model(make_model())
    larger = load_model(make_model(), transform=lambda image: torch.zeros(3, 16, 16))
    with pytest.raises(InputError, match=r"take images of different sizes \(\[3, 8, 8\] and \[3, 16, 16\]\)"):
        audit(adapter, larger, [picture(p) for p in forget], [picture(p) for p in retain], progress=False)
