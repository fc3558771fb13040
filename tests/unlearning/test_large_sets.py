"""Sets that are larger than what a run uses: samples, captions and images that are read when they are drawn."""

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

import cliperase_fast as cf
from cliperase_fast.data import as_pairs, pair_sets
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.unlearning import batches, sampling, teacher
from cliperase_fast.unlearning.batches import BatchLoader, BatchPlan, CaptionTable, Substitutes
from cliperase_fast.unlearning.selection import wilson

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
QUICK = {**tiny.QUICK, "transform": open_clip.image_transform(8, is_train=False), "num_workers": 0}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of 90 images with two captions each, of which only a few are read before training."""
    monkeypatch.setattr(pair_sets, "READ_WHOLE", 10)
    monkeypatch.setattr(pair_sets, "READ_SAMPLE", 3)
    lines = ["filepath\ttitle"]
    for number in range(90):
        colour = list(COLOURS)[number % 3]
        pixels = np.random.default_rng(number).integers(0, 40, (8, 8, 3)) + np.array(COLOURS[colour])
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines += [f"{number}.png\ta {colour} square {number}", f"{number}.png\tsome {colour} {number}"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.csv"


def forget_red(table, **changes):
    settings = {**QUICK, "steps": 4, "epochs": "auto", **changes}
    return cf.unlearn(tiny.make_tiny_clip(), f"csv:{table}#caption:red", "rest", **settings)


def weights(result):
    return torch.cat([tensor.flatten().double() for tensor in result.model.state_dict().values()])


def test_larger_sets_are_sampled_by_the_seed_and_counted(table):
    result = forget_red(table, max_retain_pairs=40, max_test_pairs=10)
    record = result.record
    assert record["data"]["sampled"] == {
        "retain": {"pairs": 40, "of": 60}, "forget test": {"pairs": 5, "of": 6}, "retain test": {"pairs": 5, "of": 8}
    }  # fmt: skip
    assert record["data"]["retain_pairs"] == 29  # without the held-out ones
    assert record["after"]["retain"]["pairs"] == 5
    low, high = record["test_intervals"]["after"]["retain"]["image_to_text_r@1"]
    assert low - 1e-9 <= record["after"]["retain"]["image_to_text_r@1"] <= high and high - low > 0.3
    assert [low, high] == pytest.approx(wilson(record["after"]["retain"]["image_to_text_r@1"], 5))
    low, high = record["test_intervals"]["before"]["forget"]["association"]
    assert low < record["before"]["forget"]["association"] < high
    assert any("40 of the 60 retain pairs" in note for note in record["notes"])
    assert any("5 of the 6 forget and 5 of the 8 retain test pairs" in note for note in record["notes"])
    again = forget_red(table, max_retain_pairs=40, max_test_pairs=10)
    assert again.record["data"]["fingerprint"] == record["data"]["fingerprint"]
    assert torch.equal(weights(again), weights(result))


def test_a_cap_that_does_not_bite_changes_nothing(table):
    whole = forget_red(table, max_retain_pairs=0, max_test_pairs=0)
    capped = forget_red(table, max_retain_pairs=60, max_test_pairs=30)  # as many as there are
    assert torch.equal(weights(capped), weights(whole))
    assert capped.record["after"] == whole.record["after"] and not capped.record["data"]["sampled"]


def test_a_cap_keeps_as_many_pairs_as_it_says_drawn_by_the_seed():
    pairs = as_pairs([(torch.zeros(3, 2, 2), f"caption {row}") for row in range(60)], "rows")
    sets = pair_sets.PairSets(pairs.subset(np.arange(10)), pairs, None, {})
    for most in (0, 60, 59, 30):
        capped = [sampling.sample_sets(sets, cf.UnlearnConfig(batch_size=6, max_retain_pairs=most, seed=seed))
                  for seed in (1, 1, 2)]  # fmt: skip
        kept = most or 60
        assert {len(found.retain) for found in capped} == {kept}
        assert all(bool(found.sampled) == (kept < 60) for found in capped)
        assert capped[0].retain.ids == capped[1].retain.ids
        assert (capped[0].retain.ids != capped[2].retain.ids) == (kept < 60)


def test_a_cap_that_leaves_less_than_a_batch_is_refused(table):
    with pytest.raises(InputError, match=r"max_retain_pairs=2 is less than the 4 retain pairs of a batch"):
        cf.UnlearnConfig(batch_size=6, max_retain_pairs=2)
    with pytest.raises(InputError, match=r"max_retain_pairs=3 leaves 1 retain pair to.*a batch has 3"):
        forget_red(table, max_retain_pairs=3)
    with pytest.raises(InputError, match=r"max_test_pairs=1 must be at least 2"):
        cf.UnlearnConfig(max_test_pairs=1)


def drawn_retain(table, step):
    """The file of a retain pair that a run of `forget_red` first draws in this step."""
    seen = []
    original = BatchLoader._batch

    def watched(self, number, pixels):
        batch = original(self, number, pixels)
        seen.append([self.pixels.pairs.ids[row] for row in batch.pairs[batch.n_forget :]])
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLoader, "_batch", watched)
        result = forget_red(table, teacher_cache="off")
    early = {name for batch in seen[: step - 1] for name in batch}
    return result, next(name for name in seen[step - 1] if name not in early)


def test_an_image_that_breaks_late_is_named_and_the_run_goes_on_once_it_is_repaired(table, tmp_path):
    whole, name = drawn_retain(table, step=3)
    path = table.parent / name
    good = path.read_bytes()
    path.write_bytes(good[:20])
    output = {"output_dir": tmp_path / "run", "teacher_cache": "off", "checkpoint_every": 1}
    with pytest.raises(UnlearningError, match=rf"before step 3: .*{name}.*step-00000002.*resume=True"):
        forget_red(table, **output)
    path.write_bytes(good)
    resumed = forget_red(table, **output, resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_skipping_puts_the_next_readable_pair_in_the_place_of_a_broken_one(table):
    _, name = drawn_retain(table, step=3)
    (table.parent / name).write_bytes(b"not an image")
    live = forget_red(table, teacher_cache="off", on_error="skip")
    kept = forget_red(table, on_error="skip")  # with the teacher's features of the drawn pairs
    for result in (live, kept):
        (skipped,) = result.record["data"]["skipped"].values()
        assert skipped["count"] == 1 and name in skipped["example"]
    totals = [[line["total"] for line in result.history if "total" in line] for result in (live, kept)]
    assert len(totals[0]) == 4 and totals[0] == pytest.approx(totals[1], rel=1e-3)


def test_a_pair_is_replaced_by_the_next_readable_one_of_its_own_set():
    data = as_pairs([(torch.full((3, 2, 2), float(row)), f"caption {row}") for row in range(8)], "rows")
    broken = {2, 3, 7}

    def read(row):
        if row in broken:
            raise InputError(f"cannot read {row}")

    replace = Substitutes(data, 4, read)
    assert replace(np.arange(8)).tolist() == [0, 1, 0, 0, 4, 5, 6, 4]
    assert sorted(replace.found) == sorted(broken)
    with pytest.raises(UnlearningError, match="cannot read 2"):
        Substitutes(data, 4, lambda row: read(2))(np.arange(8))


def tokenize(captions):
    if any("long" in caption for caption in captions):
        raise InputError("a caption is too long")
    return torch.tensor([[len(caption), 40_000 + sum(map(ord, caption))] for caption in captions])


def many_captions(**odd):
    rows = [(torch.full((3, 2, 2), float(row)), [f"caption {row}", f"text {row}"]) for row in range(60)]
    for name, caption in odd.items():
        rows[int(name[1:])][1][1] = caption
    return as_pairs(rows, "rows")


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(batches, "_ALL_CAPTIONS", 16)
    monkeypatch.setattr(batches, "_LONGEST", 2)


def test_many_captions_are_tokenised_when_they_are_used(few_at_once):
    asked = []

    def counted(captions):
        asked.extend(captions)
        return tokenize(captions)

    table = CaptionTable(many_captions(), counted)
    assert len(asked) < 20 < len(table)
    expected = tokenize(many_captions().different_captions()[0])
    rows = [5, 80, 5, 119]
    assert torch.equal(table.rows(rows), expected[rows])
    assert torch.equal(table.rows(np.arange(120)), expected)
    assert len(asked) == len(set(asked)) == 120


def test_a_caption_that_fails_when_it_is_first_used_is_named_with_its_pair(few_at_once):
    table = CaptionTable(many_captions(p33="long"), tokenize)
    with pytest.raises(InputError, match=r"too long \(a caption of '33' of rows\)"):
        table.rows(np.arange(120))


def test_drawn_lists_the_captions_that_batches_read(few_at_once):
    data = many_captions()
    plan = BatchPlan(20, 40, 4, 6, "forget", seed=1)
    loader = BatchLoader(
        data, plan, CaptionTable(data, tokenize), transform=None, random_transform=False, group_ids=None
    )
    read = list(loader.batches(0, 3))
    pairs, rows = loader.drawn(3, forget=True)
    assert set(np.concatenate([batch.pairs for batch in read])) <= set(pairs)
    assert set(np.concatenate([batch.caption_of_pair for batch in read])) <= set(rows)
    assert len(rows) == len(pairs) == 20 + 18  # one caption of each pair in the first epoch
    pairs, rows = loader.drawn(1 + plan.batches_per_epoch, forget=True)
    assert set(rows) == set(np.concatenate([loader.captions.of_pair[pair] for pair in pairs]))


def test_the_teacher_keeps_only_what_is_drawn_and_a_sample_gives_the_background(table, monkeypatch):
    settings = {"select": "divergence", "method": "calibrated"}
    whole = forget_red(table, **settings)
    monkeypatch.setattr(batches, "_ALL_CAPTIONS", 16)
    monkeypatch.setattr(batches, "_LONGEST", 2)
    monkeypatch.setattr(teacher, "BACKGROUND_WHOLE", 20)
    monkeypatch.setattr(teacher, "BACKGROUND_SAMPLE", 15)
    encoded = []
    original = teacher._encode_images
    monkeypatch.setattr(teacher, "_encode_images", lambda *args: (encoded.append(len(args[2])), original(*args)))
    sampled = forget_red(table, **settings)
    assert encoded == [22 + 12, 15]  # forget pairs and the retain pairs of four steps; the background
    levels = [result.record["selection"]["background"] for result in (whole, sampled)]
    assert levels[0] == pytest.approx(levels[1], abs=0.1) and levels[0] != levels[1]


def test_a_split_with_many_captions_is_sampled_smaller():
    rows = [(torch.zeros(3, 2, 2), [f"caption {row} {number}" for number in range(10)]) for row in range(40)]
    parts = as_pairs(rows[:8], "forget"), as_pairs(rows[8:], "retain")
    counts = {}
    drawn = sampling.sample_evaluation(parts, "test", cf.UnlearnConfig(max_test_pairs=40), counts)
    assert list(map(len, drawn)) == [8, 12] and counts == {"retain test": {"pairs": 12, "of": 32}}


def test_the_interval_of_the_association_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(0.3, 0.2, 400).astype(np.float32)
    scores = {"pairs": 400, "association": float(values.mean())}
    found = sampling.test_intervals({"forget": scores, "retain": scores}, {"forget": values, "retain": values})
    low, high = found["retain"]["association"]
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.1)
