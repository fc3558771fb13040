from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from cliperase_fast.data import PairDataset, as_pairs, concat, open_source
from cliperase_fast.errors import InputError


def image(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (4, 4), (shade, shade, shade))


def cats_and_dogs(each: int = 3) -> list[tuple[Image.Image, str]]:
    return [(image(n), f"a photo of a {'cat' if n % 2 else 'dog'}") for n in range(2 * each)]


def test_a_list_of_pairs_gives_images_captions_and_ids() -> None:
    pairs = as_pairs(cats_and_dogs(), "pets")
    assert len(pairs) == 6
    assert pairs[1][1] == "a photo of a cat"
    assert pairs.image(5).getpixel((0, 0)) == (5, 5, 5)
    assert pairs.ids == ["0", "1", "2", "3", "4", "5"]
    assert pairs.name == "pets"
    assert len(list(pairs)) == 6


def test_images_of_every_mode_become_rgb() -> None:
    pairs = as_pairs([(Image.new(mode, (4, 4)), "x") for mode in ("L", "RGBA", "P", "CMYK", "1")], "modes")
    assert {pairs.image(i).mode for i in range(5)} == {"RGB"}


def test_several_captions_of_an_image_stay_with_it() -> None:
    pairs = as_pairs([(image(), ["a dog", "a puppy"]), (image(), "a cat")], "pets")
    assert pairs.captions == [("a dog", "a puppy"), ("a cat",)]
    assert pairs[0][1] == "a dog"


def test_token_ids_pass_as_they_are() -> None:
    pixels = torch.rand(3, 4, 4)
    pairs = as_pairs([(pixels, torch.tensor([1, 2, 0], dtype=torch.int32))] * 4, "tokens")
    (caption,) = pairs.captions[0]
    assert caption.dtype == torch.int64 and caption.tolist() == [1, 2, 0]
    assert pairs.image(0) is pixels
    assert pairs.classes is None
    several = as_pairs([(pixels, torch.tensor([[1, 2], [3, 4]]))], "tokens")
    assert [caption.tolist() for caption in several.captions[0]] == [[1, 2], [3, 4]]


def test_captions_are_the_text_that_is_meant() -> None:
    class Animal(str, Enum):
        CAT = "a cat"

    pairs = as_pairs([(image(), Animal.CAT), (image(), "a cat\n"), (image(), [" a cat", "a pet"])], "pets")
    assert pairs.captions == [("a cat",), ("a cat",), ("a cat", "a pet")]


def test_a_subset_with_items_of_its_own_keeps_them() -> None:
    class Captioned(Subset):
        def __getitem__(self, index: int) -> tuple[Image.Image, str]:
            number, name = self.dataset[self.indices[index]]
            return image(number), f"a sketch of a {name}"

        def __getitems__(self, indices: list[int]) -> list[tuple[Image.Image, str]]:
            return [self[index] for index in indices]

    pairs = as_pairs(Subset(Captioned([(7, "cat"), (8, "dog"), (9, "owl")], [2, 1]), [1]), "pets")
    assert pairs.captions == [("a sketch of a dog",)]
    assert pairs.image(0).getpixel((0, 0)) == (8, 8, 8)


def test_data_sets_that_torch_joins_keep_all_captions() -> None:
    first = as_pairs([(image(1), ["a cat", "a pet"]), (image(2), "a dog")], "first")
    joined = first + Subset(as_pairs([(image(3), ["an owl", "a bird"]), (image(4), "x")], "second"), [0])
    pairs = as_pairs(joined, "both")
    assert pairs.captions == [("a cat", "a pet"), ("a dog",), ("an owl", "a bird")]
    assert [pairs.image(row).getpixel((0, 0))[0] for row in range(3)] == [1, 2, 3]
    assert as_pairs(Subset(joined, [2, 0]), "some").captions == [("an owl", "a bird"), ("a cat", "a pet")]
    assert as_pairs(joined + first, "all").captions == [*pairs.captions, *first.captions]


@pytest.mark.parametrize(("indices", "kind"), [([True, False, True], "a mask"), ([0.0, 1.0], "of the type float64")])
def test_indices_that_are_no_numbers_of_items_are_refused(indices: list[float], kind: str) -> None:
    for items in (cats_and_dogs(), as_pairs(cats_and_dogs(), "pets")):
        with pytest.raises(InputError, match=rf"indices of pets, .* are {kind}; .*np\.flatnonzero\(mask\)"):
            as_pairs(Subset(items, indices), "pets")
    assert as_pairs(Subset(cats_and_dogs(), list(torch.tensor([2, 1]))), "pets").ids == ["2", "1"]


def test_repeated_captions_become_classes_with_short_names() -> None:
    pairs = as_pairs(cats_and_dogs(), "pets")
    assert pairs.classes == ("cat", "dog")
    assert pairs.labels is not None and pairs.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert pairs.prompts == (("a photo of a cat",), ("a photo of a dog",))
    assert pairs.class_prompts("dog") == pairs.class_prompts(1) == ["a photo of a dog"]


def test_captions_that_hardly_repeat_give_no_classes() -> None:
    items = [(image(), text) for text in ("a", "b", "c", "c", "d")]
    assert as_pairs(items, "loose").classes is None
    assert as_pairs([*items, (image(), "d"), (image(), "d"), (image(), "d")], "tight").classes is not None


def test_more_than_a_thousand_captions_give_no_classes() -> None:
    assert as_pairs([(None, f"thing {n % 1000}") for n in range(2000)], "x").classes is not None
    assert as_pairs([(None, f"thing {n % 1001}") for n in range(2002)], "x").classes is None


def test_a_pair_dataset_and_its_subsets_pass_through() -> None:
    pairs = open_source("demo").train
    assert as_pairs(pairs, "other") is pairs
    part = as_pairs(Subset(Subset(pairs, [5, 6, 7, 8]), [3, 1]), "other")
    assert part.ids == [pairs.ids[8], pairs.ids[6]]
    assert part.captions == [pairs.captions[8], pairs.captions[6]]
    assert part.classes == pairs.classes


def test_a_torch_subset_keeps_the_positions_of_its_dataset() -> None:
    part = as_pairs(Subset(cats_and_dogs(), [4, 1]), "pets")
    assert part.ids == ["4", "1"]
    assert part.image(0).getpixel((0, 0)) == (4, 4, 4)


def test_subset_takes_indices_or_a_mask_and_shares_images() -> None:
    pairs = as_pairs(cats_and_dogs(), "pets")
    by_index, by_mask = pairs.subset([1, 3]), pairs.subset(np.array([0, 1, 0, 1, 0, 0], dtype=bool))
    assert by_index.ids == by_mask.ids == ["1", "3"]
    assert by_index.store is pairs.store
    assert by_index.subset([1]).image(0).getpixel((0, 0)) == (3, 3, 3)
    assert by_index.classes == pairs.classes
    with pytest.raises(InputError, match="mask of 2"):
        pairs.subset(np.array([True, False]))
    with pytest.raises(IndexError):
        by_index[2]


def test_fingerprint_sees_ids_captions_labels_and_order_but_not_pixels() -> None:
    base = as_pairs(cats_and_dogs(), "a")
    repainted = as_pairs([(image(200), caption) for _, caption in cats_and_dogs()], "b")
    assert base.fingerprint() == repainted.fingerprint()
    assert base.fingerprint() != base.subset([1, 0, 2, 3, 4, 5]).fingerprint()
    assert base.fingerprint() != base.subset(range(5)).fingerprint()
    other_caption = cats_and_dogs()
    other_caption[0] = (image(), "a photo of a wolf")
    assert base.fingerprint() != as_pairs(other_caption, "a").fingerprint()
    joined_differently = [as_pairs([(image(), texts)], "x").fingerprint() for texts in (["a", "b"], ["a', 'b"])]
    assert len(set(joined_differently)) == 2
    relabelled = base.subset(range(6))
    assert relabelled.labels is not None
    relabelled.labels = 1 - relabelled.labels
    assert base.fingerprint() != relabelled.fingerprint()


def test_entities_follow_their_pairs_and_are_the_groups_before_classes() -> None:
    plain = as_pairs(cats_and_dogs(), "a")
    assert plain.entities is None
    assert plain.labels is not None and np.array_equal(plain.group_ids, plain.labels)
    named = PairDataset("a", plain.store, plain.captions, plain.ids, labels=plain.labels, space=plain.space,
                        entities=np.arange(6) // 2)  # fmt: skip
    assert named.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert named.fingerprint() != plain.fingerprint()
    parts = [named.subset([4, 1]), named.subset(np.arange(6) == 2)]
    assert concat(parts).entities.tolist() == [2, 0, 1]
    assert concat([*parts, plain]).entities is None
    with pytest.raises(ValueError, match="one entry for each image"):
        PairDataset("a", plain.store, plain.captions, plain.ids, entities=np.arange(5))


def test_concat_keeps_kinds_of_classes_and_gives_classes_without_one_their_own() -> None:
    shapes = open_source("shapes?train=1&test=1").train.subset([0])
    plain = open_source("demo").train.subset([0])
    shapes.space = replace(shapes.space, kinds=tuple(name.split()[1] for name in shapes.classes))
    assert concat([shapes, shapes]).class_kinds.tolist() == shapes.class_kinds.tolist()
    both = concat([plain, shapes])
    assert both.space.kinds == ("",) * 10 + shapes.space.kinds
    assert concat([plain, plain]).class_kinds is None


def test_concat_names_the_classes_of_forget_and_retain_alike() -> None:
    forget = as_pairs([(image(), "a photo of a dog")] * 4, "forget")
    retain = as_pairs([(image(), f"a photo of a {name}") for name in ("cat", "owl") * 4], "retain")
    assert forget.classes == ("a photo of a dog",)
    both = concat([forget, retain])
    assert both.classes == ("cat", "dog", "owl")
    assert both.labels is not None
    assert [both.classes[label] for label in both.labels[:6]] == ["dog"] * 4 + ["cat", "owl"]
    assert both.captions[0] == ("a photo of a dog",)


def test_concat_keeps_classes_that_are_too_few_to_be_seen_in_one_part() -> None:
    single = as_pairs([(image(), "a photo of a dog")], "single")
    retain = as_pairs([(image(), f"a photo of a {name}") for name in ("cat", "owl") * 2], "retain")
    assert single.classes is None
    assert concat([single, retain.subset([0])]).classes == ("cat", "dog", "owl")


def test_concat_of_parts_of_one_source_keeps_its_classes_and_images() -> None:
    pairs = open_source("demo").test
    assert pairs is not None
    back = concat([pairs.subset([3, 4]), pairs.subset([0])])
    assert back.store is pairs.store and back.classes == pairs.classes
    assert back.ids == [pairs.ids[3], pairs.ids[4], pairs.ids[0]]
    assert back.image(2).tobytes() == pairs.image(0).tobytes()


def test_concat_reads_images_of_each_part_from_its_own_place() -> None:
    first, second = as_pairs([(image(1), "x"), (image(2), "y")], "a"), as_pairs([(image(3), "z")], "b")
    both = concat([second, first.subset([1]), second])
    assert [both.image(i).getpixel((0, 0))[0] for i in range(3)] == [3, 2, 3]
    assert both.name == "b + a"


def test_concat_joins_named_classes_by_name() -> None:
    demo, shapes = open_source("demo").train, open_source("shapes?train=1&test=1").train
    both = concat([demo.subset([0, 1]), shapes.subset([5])])
    assert both.classes is not None and len(both.classes) == 110
    assert both.labels is not None and both.classes[both.labels[2]] == "red ring"
    assert both.class_prompts("red ring") == ["a red ring"]
    free = as_pairs([(image(), "who knows")], "free")
    assert concat([demo, free]).classes is None and concat([demo, free]).labels is None


class _Labelled(Dataset):
    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return image(), index


class _Stream(IterableDataset):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        yield image(), "x"


class _Failing(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise KeyError("gone")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (_Labelled(), r"caption of item 0 of mine is the number 0, a class label.*dataset\.classes\[label\]"),
        ([(image(), 3)], r"class_names\[label\]"),
        (_Stream(), "map-style"),
        (iter([]), "map-style"),
        ("a string", "mine is a str"),
        ([(image(), "x", 3)], "item 0 of mine is a tuple of 3"),
        ([image()], "item 0 of mine is a Image"),
        (_Failing(), "item 0 of mine cannot be read: KeyError"),
        ([(image(), "x"), (image(), " ")], "caption of item 1 of mine is empty"),
        ([(image(), [])], "empty list"),
        ([(image(), None)], "is a NoneType"),
        ([(image(), ["ok", 3])], "is a int"),
        ([(image(), torch.rand(3))], "float32"),
        ([(image(), torch.zeros(1, 2, 3, dtype=torch.long))], r"\[1, 2, 3\]"),
        ([(image(), "x"), (image(), torch.tensor([1]))], "item 0 has text, item 1 has 1 token ids"),
        ([(image(), torch.tensor([1, 2])), (image(), torch.tensor([1]))], "2 token ids, item 1 has 1"),
    ],
)  # fmt: skip
def test_items_that_are_not_pairs_are_named(dataset: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_pairs(dataset, "mine")


def test_an_image_of_an_unknown_type_is_named_when_read() -> None:
    pairs = as_pairs([(np.zeros((4, 4, 3)), "x")], "arrays")
    with pytest.raises(InputError, match="image 0 of arrays is an ndarray"):
        pairs.image(0)


def test_pairs_travel_to_loader_processes(tmp_path, picture) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            picture(tmp_path / name / f"{number}.png", shade=number)
    for pairs in (open_source(f"folder:{tmp_path}").train, open_source("demo").train.subset(range(6))):
        copy = pickle.loads(pickle.dumps(pairs))
        assert copy.fingerprint() == pairs.fingerprint()
        assert copy.image(2).tobytes() == pairs.image(2).tobytes()
        loader = DataLoader(pairs, batch_size=6, num_workers=1, collate_fn=list)
        (batch,) = loader
        assert [caption for _, caption in batch] == [captions[0] for captions in pairs.captions]
        assert batch[5][0].tobytes() == pairs.image(5).tobytes()


def test_negative_indices_of_a_subset_count_from_the_end() -> None:
    parts = [as_pairs(Subset(cats_and_dogs(), indices), "pets") for indices in ([-1, 0], [-2, 3])]
    assert parts[0].ids == ["5", "0"]
    joined = concat(parts)
    assert [joined.image(index).getpixel((0, 0))[0] for index in range(4)] == [5, 0, 4, 3]
    with pytest.raises(InputError, match="item 6 of pets cannot be read: IndexError"):
        as_pairs(Subset(cats_and_dogs(), [6]), "pets")


def test_an_error_of_the_dataset_is_reported_in_one_line() -> None:
    class Failing(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            raise RuntimeError("gone\n  for good")

    with pytest.raises(InputError, match=r"^item 0 of data cannot be read: RuntimeError: gone for good, or pass"):
        as_pairs(Failing(), "data")
