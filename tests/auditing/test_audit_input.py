"""What `audit()` takes and refuses: options, oracles, further data, test sets and damaged pairs."""

from unittest import mock

import open_clip
import pytest
import torch
from small import SYNONYMS, make_model, make_pairs, training_and_test, without_red

from cliperase_fast import InputError, audit
from cliperase_fast.models import load_model


def run(before=None, after=None, forget=None, retain=None, **options):
    """An audit of two models on colours, red being forgotten."""
    first, second, test = training_and_test()
    options = {"test": test, "synonyms": SYNONYMS, "progress": False, **options}
    forget, retain = first if forget is None else forget, second if retain is None else retain
    return audit(before or make_model(), after or without_red(), forget, retain, **options)


def tensors(found, model="after"):
    return {group: {name: score["value"] for name, score in of.items()} for group, of in found.scores[model].items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "Full"}, "depth='Full' is not one of False, True, 'full'"),
        ({"depth": 1}, "depth=1 is not one of False, True, 'full'"),
        ({"oracle": []}, "oracle is an empty list: give at least one model, or None"),
        ({"oracle": "local-dir:nowhere"}, "oracle 1: .*nowhere"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number of at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be a whole number of at least 0"),
        ({"synonyms": ["crimson"]}, "synonyms is a list; pass a mapping"),
        ({"other": make_pairs(2)}, "other is a list; pass a mapping"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"precision": "fp8"}, "precision='fp8' is not one of"),
        ({"on_error": "ignore"}, "on_error='ignore' is not one of raise, skip"),
        ({"long_captions": "cut"}, "long_captions='cut' is not one of error, truncate"),
        ({"templates": ["a photo"]}, "the template 'a photo' must be text with one '{}'"),
        ({"paraphrase_templates": ["a {} or {}"]}, "the template 'a {} or {}' must be text with one '{}'"),
        ({"synonyms": {"red": "crimson"}}, r"synonyms\['red'\] is 'crimson'; give a list of texts"),
        ({"synonyms": {"red": 5}}, r"synonyms\['red'\] is 5; give a list of texts"),
        ({"synonyms": {0: ["crimson"]}}, "synonyms name 0, which is not a class"),
        ({"synonyms": {"red": [" "]}}, r"synonyms\['red'\] is \[' '\]; give a list of texts"),
        ({"holdouts": {"person": []}}, "holdouts has 'person'; its keys are 'association' and 'identity'"),
        ({"holdouts": {"identity": []}}, r"holdouts\['identity'\] is empty"),
        ({"other": {"captions": [(image, f"{n} {c}") for n, (image, c) in enumerate(make_pairs(2))]}},
         r"other\['captions'\] has no classes"),
        ({"synonyms": {"purple": ["violet"]}}, "synonyms name 'purple', which is not a class"),
        ({"other": {"none": []}}, r"other\['none'\] is empty"),
        ({"test": ([], make_pairs(2))}, "the forget test set is empty: give at least one"),
        ({"test": (make_pairs(2), [])}, "the retain test set is empty: give at least one"),
        ({"retain": make_pairs(colours=["red"])}, "every retain pair is also a forget pair: nothing is left to retain"),
        ({"forget": []}, "the forget set is empty: give at least one"),
        ({"test_fraction": 1.0}, "test_fraction=1.0 must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_anything_is_encoded(options, message):
    with mock.patch("cliperase_fast.auditing.comparison.encode_model") as encode:
        with pytest.raises(InputError, match=message):
            run(**options)
        encode.assert_not_called()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_opened(tmp_path):
    (tmp_path / "file").write_text("")
    with mock.patch("cliperase_fast.auditing.api.open_sets") as opened:
        with pytest.raises(InputError, match=r"output_dir=.*file"):
            run(output_dir=tmp_path / "file" / "audit")
        opened.assert_not_called()


def test_models_with_contexts_of_different_lengths_are_refused():
    longer = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    with pytest.raises(InputError, match=r"'before' and 'oracle 1' read captions of different lengths \(12 and 16"):
        run(oracle=longer)


def test_an_oracle_may_be_a_folder(tmp_path):
    oracle = without_red(1)
    load_model(oracle).save(tmp_path / "oracle")
    assert run(oracle=f"local-dir:{tmp_path / 'oracle'}").scores == run(oracle=[oracle]).scores


def test_a_model_that_is_given_as_two_oracles_is_refused(tmp_path):
    oracle = without_red(1)
    load_model(oracle).save(tmp_path / "oracle")
    (tmp_path / "link").symlink_to(tmp_path / "oracle")
    named = f"local-dir:{tmp_path / 'oracle'}"
    for second in (named, tmp_path / "oracle", f"local-dir:{tmp_path / 'link'}"):
        with pytest.raises(InputError, match=r"oracle 1 and oracle 3 are the same model \(.*\): give each oracle once"):
            run(oracle=[named, without_red(), second])
    with pytest.raises(InputError, match=r"oracle 1 and oracle 2 are the same model \(the CLIP object\)"):
        run(oracle=[oracle, oracle])


def test_damaged_weights_name_the_model():
    damaged = without_red()
    with torch.no_grad():
        damaged.text_projection[0, 0] = torch.nan
    with pytest.raises(InputError, match="after: the model's weights are damaged: 1 of the 256 values"):
        run(after=damaged)


def test_other_data_is_scored_and_must_not_show_what_was_forgotten():
    kept = make_pairs(4, seed=5, colours=["green", "blue"])
    found = run(other={"colours": kept})
    assert found.scores["after"]["collateral"]["other:colours"]["value"] == 1
    assert found.scores["after"]["collateral"]["other"] == found.scores["after"]["collateral"]["other:colours"]
    assert found.scores["after"]["depth"]["unusual"]["value"] is not None
    with pytest.raises(InputError, match=r"other\['colours'\] shows '.*red.*', which was forgotten: leave such pairs"):
        run(other={"colours": make_pairs(4, seed=5)})


def test_held_out_pairs_are_scored_and_must_not_be_forget_pairs():
    held_out = make_pairs(4, seed=6, colours=["blue"])
    found = run(holdouts={"association": held_out, "identity": make_pairs(4, seed=6, colours=["green"])})
    intra = found.scores["after"]["collateral"]["intra_identity"]["value"]
    adapter = load_model(without_red())
    with torch.no_grad():
        images = adapter.encode_image(torch.stack([image for image, _ in held_out]))
        caption = adapter.encode_text(adapter.tokenize(["a blue square"]))[0]
    assert intra == pytest.approx(float((images @ caption).mean()), abs=1e-5)
    assert found.scores["after"]["collateral"]["inter_identity"]["value"] != intra
    forget, _, _ = training_and_test()
    with pytest.raises(InputError, match=r"12 of the 12 pairs of holdouts\['association'\] are forget pairs"):
        run(holdouts={"association": forget})


def test_a_forgotten_class_without_test_pairs_is_noted():
    test = make_pairs(8, seed=1, colours=["red"]), make_pairs(8, seed=1, colours=["blue", "grey"])
    forget, retain = make_pairs(colours=["red", "green"]), make_pairs(colours=["blue", "grey"])
    found = run(forget=forget, retain=retain, test=test)
    assert found.scores["before"]["forgetting"]["zero_shot_top1"]["value"] == 1
    assert "No test pair shows the forgotten class 'green', which has no scores." in found.notes


def test_unreadable_pairs_are_refused_or_left_out_and_counted():
    _, retain, _ = training_and_test()
    damaged = [(torch.full_like(retain[0][0], torch.nan), retain[0][1]), *retain[1:]]
    with pytest.raises(InputError, match="has pixels that are not finite"):
        run(retain=damaged)
    found = run(retain=damaged, on_error="skip")
    assert found.data["skipped"]["pixels are not finite"]["count"] == 1
    assert "1 pair is left out: pixels are not finite." in found.notes
    assert tensors(found)["forgetting"] == tensors(run(retain=retain[1:]))["forgetting"]


def test_long_captions_are_refused_or_cut():
    long = " and again" * 8
    forget, retain, test = (
        [(image, caption + long) for image, caption in part] for part in (*training_and_test()[:2], make_pairs(3))
    )
    options = {"forget": forget, "retain": retain, "test": test, "synonyms": {}, "paraphrase_templates": ()}
    with pytest.raises(InputError, match="captions are too long"):
        run(**options)
    found = run(**options, long_captions="truncate")
    assert found.scores["before"]["forgetting"]["association"]["value"] is not None


def test_loader_processes_give_the_same_scores():
    assert run(num_workers=1).scores == run().scores
