"""An audit does each piece of work once: images are decoded once for all models, and unused token rows stay."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from small import SYNONYMS, make_model, training_and_test, without_red

from cliperase_fast import audit
from cliperase_fast.auditing import relearning
from cliperase_fast.auditing.features import Encoding, keep_features
from cliperase_fast.auditing.relearning import draw_batch, relearn
from cliperase_fast.data import as_pairs
from cliperase_fast.models import load_model


def pictures(pairs):
    """The same pairs with PIL images, in shades of their colours."""
    return [
        (Image.fromarray(((image.clamp(-2, 2) + 2) * 63).byte().permute(1, 2, 0).numpy()), caption)
        for image, caption in pairs
    ]


class Transform:
    """From a picture to pixels; counts how often it sees each."""

    def __init__(self):
        self.seen = Counter()

    def __call__(self, picture):
        self.seen[picture.tobytes()] += 1
        return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 63 - 2


def test_each_image_is_transformed_once_for_all_models():
    forget, retain, test = training_and_test()
    test = tuple(map(pictures, test))
    seen = Transform()
    options = {"test": test, "synonyms": SYNONYMS, "progress": False, "depth": True, "transform": seen}
    with mock.patch.multiple(relearning, STEPS=(0, 1), DRAWS=2):
        audit(make_model(), without_red(), pictures(forget), pictures(retain), oracle=[without_red(1)], **options)
    every = [picture for picture, _ in pictures([*forget, *retain])] + [picture for part in test for picture, _ in part]
    assert set(seen.seen) >= {picture.tobytes() for picture in every}
    first = test[0][0][0].tobytes()  # by which the models are compared
    assert {count for picture, count in seen.seen.items() if picture != first} == {1}


def test_models_with_transforms_of_their_own_see_their_own_pixels():
    forget, retain, test = training_and_test()
    darker = load_model(make_model(), transform=lambda picture: Transform()(picture) - 1)
    given = pictures(forget), pictures(retain)
    options = {"test": tuple(map(pictures, test)), "synonyms": SYNONYMS, "progress": False}
    plain = audit(load_model(make_model(), transform=Transform()), darker, *given, **options)
    alone = audit(darker, darker, *given, **options)
    assert plain.scores["after"]["forgetting"] == alone.scores["after"]["forgetting"]
    assert plain.scores["after"]["forgetting"] != plain.scores["before"]["forgetting"]


def test_relearning_without_unused_token_rows_ends_in_the_same_weights():
    forget, retain, _ = training_and_test()
    adapter, how = load_model(make_model()), Encoding(64, torch.device("cpu"))
    tokens = adapter.tokenize(["a red square", "a word that no caption has"])

    class Features:
        """Stands in for the forget test: what the copy makes of two captions."""

        def named(self, copy, how):
            with torch.no_grad():
                return copy.encode_text(tokens).numpy()

    batch = draw_batch(adapter, as_pairs(forget, "forget"), as_pairs(retain, "retain"), 4, 0)
    with mock.patch.object(relearning, "STEPS", (0, 1, 4)):
        found = relearn(adapter, batch, Features(), how, 0)
        with mock.patch.object(relearning, "train_rows", lambda copy, named, tokens: named):
            whole = relearn(adapter, batch, Features(), how, 0)
    assert all(np.array_equal(found[step], whole[step]) for step in (0, 1, 4))
    assert not np.array_equal(found[0], found[4])


def counted(model):
    """The model's adapter, and the sizes of the image batches that it encodes."""
    adapter, seen = load_model(model), []
    own = adapter.module.encode_image
    adapter.module.encode_image = lambda images, *more, **options: (
        seen.append(len(images)) or own(images, *more, **options)
    )
    return adapter, seen


@pytest.mark.filterwarnings("ignore:oracle 1 knows the rest less well")  # one has its projection turned around
def test_audits_in_one_context_encode_a_model_that_they_share_once():
    forget, retain, test = training_and_test()
    options = {"test": test, "synonyms": SYNONYMS, "progress": False}
    before, (oracle, seen) = load_model(make_model()), counted(without_red(1))
    plain = [audit(before, without_red(seed), forget, retain, oracle=[oracle], **options) for seed in (2, 3)]
    alone = len(seen)
    seen.clear()
    with keep_features():
        kept = [audit(before, without_red(seed), forget, retain, oracle=[oracle], **options) for seed in (2, 3)]
        assert len(seen) == alone / 2
        assert [one.to_dict() for one in kept] == [one.to_dict() for one in plain]
        with torch.no_grad():
            oracle.module.text_projection.mul_(-1)
        other = audit(before, without_red(3), forget, retain, oracle=[oracle], **options)
        assert other.scores["oracle"] != kept[1].scores["oracle"], "another model by its weights"
    seen.clear()
    audit(before, without_red(2), forget, retain, oracle=[oracle], **options)
    assert len(seen) == alone / 2, "nothing is kept after the context"
