from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset, Subset

from cliperase_fast.data import as_pairs, check_images, concat, open_source, overlap, same_pairs, split
from cliperase_fast.data.pair_sets import Opener, hold_out, open_pair_sets
from cliperase_fast.errors import InputError

# --- splitting


def labelled(counts: list[int]):
    return as_pairs([(None, f"thing {k:02}") for k, count in enumerate(counts) for _ in range(count)], "x")


def test_each_class_gives_its_share() -> None:
    pairs = labelled([50, 30, 20])
    rest, held_out = split(pairs, 0.2, seed=3)
    assert pairs.labels is not None
    assert np.bincount(pairs.labels[held_out]).tolist() == [10, 6, 4]
    assert np.bincount(pairs.labels[rest]).tolist() == [40, 24, 16]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_is_complete_sorted_sized_and_repeatable(counts: list[int], fraction: float, seed: int) -> None:
    pairs = labelled(counts)
    n = len(pairs)
    if n < 2:
        return
    rest, held_out = split(pairs, fraction, seed)
    assert sorted([*rest, *held_out]) == list(range(n))
    assert (np.diff(rest) > 0).all() and (np.diff(held_out) > 0).all()
    assert len(held_out) == min(max(round(n * fraction), 1), n - 1)
    again = split(pairs, fraction, seed)
    assert (rest == again[0]).all() and (held_out == again[1]).all()
    if pairs.labels is not None:
        shares = np.bincount(pairs.labels[held_out], minlength=len(counts)) / np.array(counts)
        assert (np.abs(shares - len(held_out) / n) * np.array(counts) < 1 + 1e-9).all()


def test_the_seed_changes_the_split() -> None:
    pairs = labelled([50, 50])
    assert (split(pairs, 0.2, 0)[1] != split(pairs, 0.2, 1)[1]).any()


def test_a_class_keeps_its_last_pair_where_possible() -> None:
    for seed in range(10):
        pairs = labelled([1, 3, 3])
        rest, held_out = split(pairs, 0.43, seed)
        assert pairs.labels is not None and len(held_out) == 3
        assert set(pairs.labels[rest]) == {0, 1, 2}


def test_small_shares_do_not_always_fall_to_the_first_classes() -> None:
    pairs = labelled([4] * 20)
    assert pairs.labels is not None
    taken = {int(label) for seed in range(20) for label in pairs.labels[split(pairs, 0.1, seed)[1]]}
    assert len(taken) > 15


def test_pairs_without_classes_are_split_at_random() -> None:
    pairs = as_pairs([(None, f"caption {k}") for k in range(10)], "x")
    assert pairs.labels is None
    rest, held_out = split(pairs, 0.3, 0)
    assert (len(rest), len(held_out)) == (7, 3)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0])
def test_a_fraction_outside_of_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        split(labelled([5]), fraction, 0)


def test_one_pair_cannot_be_split() -> None:
    with pytest.raises(InputError, match="needs at least two"):
        split(labelled([1]), 0.5, 0)


# --- unreadable images


def folder_with_bad_images(root: Path, picture) -> None:
    for number in range(4):
        picture(root / "cat" / f"{number}.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "cat" / "truncated.jpg")
    data = (root / "cat" / "truncated.jpg").read_bytes()
    (root / "cat" / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (root / "cat" / "text.png").write_text("no image")
    (root / "cat" / "empty.png").write_bytes(b"")
    whole = (root / "cat" / "3.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[:-30])


def test_bad_image_files_are_named_and_counted(tmp_path: Path, picture) -> None:
    folder_with_bad_images(tmp_path, picture)
    pairs = open_source(f"folder:{tmp_path}").train
    with pytest.raises(InputError, match=r"cut\.png.*4 of the 8 images of folder:.*on_error='skip'"):
        check_images(pairs, on_error="raise")
    good, bad = check_images(pairs, on_error="skip")
    assert [pairs.ids[i] for i in good] == [f"cat/{n}.png" for n in range(4)]
    assert [next(n for n in ("cut", "empty", "text", "truncated") if n in one.message) for one in bad] == [
        "cut",
        "empty",
        "text",
        "truncated",
    ]


def test_a_file_deleted_after_opening_is_named(tmp_path: Path, picture) -> None:
    picture(tmp_path / "cat" / "1.png")
    gone = picture(tmp_path / "cat" / "2.png")
    pairs = open_source(f"folder:{tmp_path}").train
    gone.unlink()
    with pytest.raises(InputError, match=r"2\.png does not exist \(1 of the 2"):
        check_images(pairs)


def test_pixels_in_memory_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = open_source("demo").train
    monkeypatch.setattr(type(pairs.store), "image", None)
    good, bad = check_images(pairs)
    assert len(good) == len(pairs) and bad == []


def test_a_list_of_lazily_opened_images_is_checked(tmp_path: Path, picture) -> None:
    folder_with_bad_images(tmp_path, picture)
    lazy = Image.open(tmp_path / "cat" / "truncated.jpg")
    pairs = as_pairs([(Image.new("RGB", (2, 2)), "x"), (lazy, "y")], "mine")
    with pytest.raises(InputError, match="cannot read image 1 of mine: OSError"):
        check_images(pairs)


def test_on_error_has_two_values() -> None:
    with pytest.raises(InputError, match="on_error='ignore'"):
        check_images(labelled([2]), on_error="ignore")


def tensors(*images: torch.Tensor):
    return as_pairs([(image, f"caption {n}") for n, image in enumerate(images)], "mine")


def test_tensor_images_in_order_pass() -> None:
    good, bad = check_images(tensors(torch.rand(3, 8, 8), torch.rand(3, 8, 8)))
    assert good.tolist() == [0, 1] and bad == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            torch.rand(3, 8, 9),
            r"'0' is a float32 tensor \[3, 8, 8\] on cpu, '1' is a float32 tensor \[3, 8, 9\]",
        ),
        (torch.rand(3, 8, 8).double(), "'1' is a float64 tensor"),
        (Image.new("RGB", (8, 8)), "'1' is a PIL image"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "image '1' of mine is a uint8 tensor.*must be float"),
        (torch.rand(8, 8, 3), r"image '1' of mine is a tensor \[8, 8, 3\].*\[3, H, W\]"),
        (torch.rand(1, 3, 8, 8), r"must be \[3, H, W\]"),
    ],
)
def test_tensor_images_that_do_not_fit_are_named(second, message: str) -> None:
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match=message):
            check_images(tensors(torch.rand(3, 8, 8), second), on_error=on_error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_named(value: float) -> None:
    broken = torch.rand(3, 8, 8)
    broken[2, 7, 7] = value
    pairs = tensors(torch.rand(3, 8, 8), broken)
    with pytest.raises(InputError, match="image '1' of mine has pixels that are not finite"):
        check_images(pairs)
    good, bad = check_images(pairs, on_error="skip")
    assert good.tolist() == [0] and len(bad) == 1


def test_pixels_in_memory_and_tensors_do_not_mix() -> None:
    with pytest.raises(InputError, match="differ in form"):
        check_images(concat([tensors(torch.rand(3, 8, 8)), open_source("demo").train.subset([0, 1])]))


def test_pixels_in_memory_and_decoded_files_do_mix(tmp_path: Path, picture) -> None:
    picture(tmp_path / "cat" / "1.png")
    both = concat([open_source(f"folder:{tmp_path}").train, open_source("demo").train.subset([0, 1])])
    assert check_images(both)[0].tolist() == [0, 1, 2]


class OneCaptionEach(Dataset):
    """Images with several captions, an item for each, as many datasets of captions are written."""

    def __init__(self, images: int, captions: list[str]) -> None:
        self.images, self.captions = images, captions

    def __len__(self) -> int:
        return self.images * len(self.captions)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        number, which = divmod(index, len(self.captions))
        return Image.new("RGB", (2, 2), (number, 0, 0)), self.captions[which].format(number)


@pytest.mark.parametrize("captions", [["thing {}", "the {}. thing", "{}"], ["a thing", "a photo"]])
def test_pairs_of_one_image_are_held_out_together(captions: list[str]) -> None:
    items = OneCaptionEach(20, captions)
    for data in (items, [items[index] for index in range(len(items))], Subset(items, range(len(items)))):
        rest, held_out = hold_out(as_pairs(data, "things"), 0.2, seed=3)
        one, other = ({part.image(row).getpixel((0, 0)) for row in range(len(part))} for part in (rest, held_out))
        assert len(held_out) == 4 * len(captions) and not one & other


def test_a_class_with_a_single_image_is_held_out_in_its_share() -> None:
    items = [(Image.new("RGB", (2, 2), colour), f"a {colour} square") for colour in ("red", "blue") for _ in range(5)]
    _, held_out = hold_out(as_pairs(items, "squares"), 0.2, seed=3)
    assert sorted(caption for (caption,) in held_out.captions) == ["a blue square", "a red square"]


# --- overlap


def test_overlap_of_subsets_is_found_by_position_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = open_source("demo").train
    monkeypatch.setattr(type(pairs.store), "image", None)
    assert overlap(pairs.subset(range(10)), pairs.subset(range(8, 14))).tolist() == [0, 1]
    assert overlap(pairs.subset(range(10)), pairs.subset(range(10, 14))).tolist() == []


def test_overlap_of_torch_subsets_of_one_dataset() -> None:
    items = [(Image.new("RGB", (2, 2), (shade, 0, 0)), "a dog") for shade in (0, 1, 2, 1)]
    assert overlap(as_pairs(Subset(items, [0, 1]), "a"), as_pairs(Subset(items, [2, 1]), "b")).tolist() == [1]
    assert overlap(as_pairs(Subset(items, [0, 1]), "a"), as_pairs(Subset(items, [2, 3]), "b")).tolist() == [1]


def test_overlap_finds_a_file_that_two_sources_name(tmp_path: Path, picture) -> None:
    picture(tmp_path / "cat" / "1.png", shade=1)
    picture(tmp_path / "cat" / "2.png", shade=2)
    (tmp_path / "t.tsv").write_text("filepath\ttitle\ncat/2.png\ta photo of a cat\ncat/1.png\tanother caption\n")
    folder, table = open_source(f"folder:{tmp_path}").train, open_source(f"csv:{tmp_path}/t.tsv").train
    assert overlap(folder, table).tolist() == [0]


def test_overlap_of_lists_compares_pixels_where_captions_agree() -> None:
    def solid(shade: int) -> Image.Image:
        return Image.new("RGB", (2, 2), (shade, 0, 0))

    forget = as_pairs([(solid(1), "a dog"), (solid(2), ["a cat", "a pet"])], "forget")
    retain = as_pairs([(solid(2), "a pet"), (solid(1), "a cat"), (solid(3), "a dog"), (solid(1), "a dog")], "retain")
    assert overlap(forget, retain).tolist() == [0, 3]


def test_overlap_knows_captions_in_another_case_and_spacing() -> None:
    forget = as_pairs([(Image.new("RGB", (2, 2)), "a big dog")], "forget")
    captions = ["A big  Dog", "a big\ndog", "a bigdog", "a big dog."]
    retain = as_pairs([(Image.new("RGB", (2, 2)), caption) for caption in captions], "retain")
    assert overlap(forget, retain).tolist() == [0, 1]


def test_test_pairs_are_forget_pairs_by_captions_in_any_case() -> None:
    def shown(*captions: str) -> list[tuple[Image.Image, str]]:
        return [(Image.new("RGB", (2, 2), (shade, 0, 0)), caption) for shade, caption in enumerate(captions)]

    sets = open_pair_sets(
        shown("a dog"), shown("a cat", "an owl"), shown("A dog", "a dog", "An owl"), Opener(), overlap_policy="error",
        test_fraction=0.2,
    )  # fmt: skip
    assert sets.test is not None and [part.ids for part in sets.test] == [["0", "1"], ["2"]]


def test_overlap_compares_tensors_and_token_captions() -> None:
    pixels, tokens = torch.rand(3, 4, 4), torch.tensor([1, 2])
    first = as_pairs([(pixels, tokens)], "a")
    second = as_pairs([(pixels.clone(), tokens.clone()), (pixels + 1, tokens), (pixels, tokens + 1)], "b")
    assert overlap(first, second).tolist() == [0]


def test_overlap_reads_no_image_whose_caption_is_on_one_side_only(tmp_path: Path, picture) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "cat" / "1.png")
    first = open_source(f"folder:{tmp_path}/cat", templates="one {}").train
    second = open_source(f"folder:{tmp_path}/dog", templates="two {}").train
    first.store.image = second.store.image = None  # type: ignore[method-assign, assignment]
    assert overlap(first, second).tolist() == []


def test_unreadable_images_overlap_with_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "1.png").write_text("broken")
    pairs = [open_source(f"folder:{tmp_path}/{name}").train for name in ("a", "b")]
    assert overlap(*pairs).tolist() == []


def test_lists_with_equal_numbers_and_captions_are_the_same_pairs_only_with_equal_images() -> None:
    first, second = (as_pairs([(torch.rand(3, 4, 4), "a dog") for _ in range(6)], name) for name in ("one", "two"))
    assert first.fingerprint() == second.fingerprint()
    assert not same_pairs(first, second)
    assert same_pairs(first, as_pairs([first[index] for index in range(6)], "a copy"))
    assert not same_pairs(first, first.subset(range(5)))
