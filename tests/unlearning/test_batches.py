import numpy as np
import pytest
import torch

from cliperase_fast.config import UnlearnConfig
from cliperase_fast.data import as_pairs
from cliperase_fast.data.drawing import seeded
from cliperase_fast.distributed import Ranks
from cliperase_fast.unlearning.batches import BatchLoader, BatchPlan, CaptionTable
from cliperase_fast.unlearning.preparation import _group_ids
from cliperase_fast.unlearning.splits import Split


def plan(**changes):
    settings = {"n_forget": 10, "n_retain": 23, "forget_pairs": 4, "retain_pairs": 5, "epoch_over": "forget", "seed": 3}
    return BatchPlan(**{**settings, **changes})


def test_every_batch_holds_a_fixed_number_of_distinct_pairs():
    p = plan()
    for number in range(20):
        forget, retain = p.batch(number)
        assert (len(set(forget)), len(set(retain))) == (4, 5)
        assert forget.max() < 10
        assert retain.max() < 23


def test_a_batch_depends_only_on_its_number_and_the_seed():
    later = plan()
    later.batch(17)
    assert all(np.array_equal(a, b) for a, b in zip(plan().batch(5), later.batch(5), strict=True))
    assert not np.array_equal(plan().batch(5)[1], plan(seed=4).batch(5)[1])


def test_an_epoch_repeats_no_pair_and_many_epochs_visit_all():
    p = plan()
    per_epoch = p.batches_per_epoch
    assert per_epoch == 2
    first = np.concatenate([p.batch(number)[0] for number in range(per_epoch)])
    assert len(set(first)) == len(first)
    assert set(np.concatenate([p.batch(number)[0] for number in range(20 * per_epoch)])) == set(range(10))
    assert plan(epoch_over="retain").batches_per_epoch == 4


@pytest.mark.parametrize("batches", [1, 3, 7, 100])
def test_retain_used_lists_the_pairs_that_batches_visit(batches):
    p = plan()
    visited = {int(index) for number in range(batches) for index in p.batch(number)[1]}
    assert visited <= set(p.retain_used(batches))
    if batches < 8 * 4:
        assert visited == set(p.retain_used(batches))


def tokenize(captions):
    return torch.tensor([[len(caption), ord(caption[0])] for caption in captions])


def pairs():
    rows = [(torch.full((3, 2, 2), float(i)), ["ab", "c"] if i % 2 else "ab") for i in range(33)]
    return as_pairs(rows, "rows")


def loader(**changes):
    data = pairs()
    settings = {"transform": None, "random_transform": False, "group_ids": None}
    return BatchLoader(data, plan(), CaptionTable(data, tokenize), **{**settings, **changes})


def test_equal_captions_are_tokenised_and_encoded_once():
    batch = next(loader().batches(0, 1))
    assert len(batch.tokens) <= 2 < len(batch.pixels)
    assert torch.equal(batch.tokens[batch.text_of_pair][:, 0], torch.tensor([[2, 1][c] for c in batch.caption_of_pair]))


def test_pixels_are_those_of_the_planned_pairs_with_forget_first():
    batch = next(loader().batches(4, 5))
    forget, retain = plan().batch(4)
    assert batch.pixels[:, 0, 0, 0].tolist() == [*forget, *(10 + retain)]
    assert batch.pairs.tolist() == [*forget, *(10 + retain)] and batch.n_forget == len(forget)
    assert (batch.count(joint=True), batch.count(joint=False)) == (len(forget) + len(retain), len(retain))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_split_forget_and_retain_pairs_of_a_batch(size):
    parts = [next(loader(ranks=Ranks(rank, size)).batches(4, 5)) for rank in range(size)]
    shown = [part.pixels[:, 0, 0, 0].tolist() for part in parts]
    forget, retain = ([[i for i in pairs if (i < 10) == first] for pairs in shown] for first in (True, False))
    for side, planned in ((forget, plan().batch(4)[0]), (retain, 10 + plan().batch(4)[1])):
        assert [i for pairs in side for i in pairs] == planned.tolist()
        assert max(map(len, side)) - min(map(len, side)) <= 1
    assert [part.pairs.tolist() for part in parts] == shown
    assert [part.n_forget for part in parts] == [len(pairs) for pairs in forget]
    assert loader(ranks=Ranks(0, size)).pairs_of_ranks() == [len(pairs) for pairs in shown]


def test_several_captions_of_an_image_take_turns():
    shown = {}
    for number, batch in enumerate(loader().batches(0, 40)):
        forget, retain = plan().batch(number)
        for pair, caption in zip([*forget, *(10 + retain)], batch.caption_of_pair, strict=True):
            shown.setdefault(int(pair), set()).add(int(caption))
    assert all(captions == ({0, 1} if pair % 2 else {0}) for pair, captions in shown.items())


@pytest.mark.parametrize(
    ("group_ids", "expected"),
    [(None, None), (np.arange(33) * 7, "labels"), (np.empty(0, dtype=np.int64), "captions")],
)
def test_group_ids_follow_classes_or_captions(group_ids, expected):
    batch = next(loader(group_ids=group_ids).batches(0, 1))
    if expected is None:
        assert batch.group_ids is None
    elif expected == "labels":
        assert batch.group_ids.tolist() == (batch.pairs * 7).tolist()
    else:
        assert batch.group_ids.tolist() == batch.caption_of_pair.tolist()


@pytest.mark.parametrize(
    ("false_negatives", "entities", "expected"),
    [("auto", True, "entities"), ("auto", False, "labels"), ("none", True, None), ("caption", True, "captions")],
)
def test_groups_of_a_run_are_entities_before_classes(false_negatives, entities, expected):
    data = as_pairs([(torch.zeros(3, 2, 2), "abc"[i % 3]) for i in range(12)], "rows")
    data.entities = np.arange(12) // 4 if entities else None
    settings = UnlearnConfig(false_negatives=false_negatives)
    found = _group_ids(settings, Split(data, 2))
    if expected is None:
        assert found is None
    else:
        wanted = {"entities": data.entities, "labels": data.labels, "captions": np.empty(0)}[expected]
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_random_views_do_not_depend_on_where_a_run_starts(workers):
    from PIL import Image

    data = as_pairs([(Image.new("RGB", (2, 2)), "ab") for _ in range(33)], "rows")

    def batches(start):
        made = BatchLoader(data, plan(), CaptionTable(data, tokenize), transform=noise, random_transform=True,
                           group_ids=None, num_workers=workers)  # fmt: skip
        return list(made.batches(start, 4))

    whole, late = batches(0), batches(2)
    assert torch.equal(whole[3].pixels, late[1].pixels)
    assert not torch.equal(whole[2].pixels, whole[3].pixels)


def noise(image):
    return torch.randn(3, 2, 2)


def test_seeded_restores_the_global_generators():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(5, 6):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(5, 6):
        assert torch.equal(torch.rand(2), inside)
