from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from cliperase_fast import cli
from cliperase_fast.data import open_source, sources
from cliperase_fast.data.shapes import CLASSES, COLOURS, SHAPES
from cliperase_fast.data.source_types import Option, Request, Source, SourceType
from cliperase_fast.errors import InputError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar:/data", "unknown source 'cifar:/data'; did you mean 'cifar10:DIR'"),
        ("/data/images", "unknown source.* Use one of demo, shapes, personas, cifar10:DIR"),
        ("/", "unknown source '/'; did you mean 'folder:/'"),
        ("/data/pairs.TSV?sep=,", r"did you mean 'csv:/data/pairs.TSV\?sep=,'"),
        ("/data/{0..9}.tar", r"did you mean 'wds:/data/\{0\.\.9\}\.tar'"),
        ("", "unknown source"),
        ("cifar10", "write cifar10:DIR"),
        ("folder:", "write folder:DIR"),
        ("demo:x", "write demo"),
        ("shapes:x", "write shapes"),
        ("shapes?tran=3", "unknown option 'tran' in .* use one of train, test, size, seed"),
        ("shapes?train=0", "train='0' must be a whole number from 1 to 1000000"),
        ("shapes?size=100000", "size='100000' must be a whole number from 16 to 4096"),
        ("shapes?train=1000000&size=4096", "does not fit into memory: give fewer pairs, or smaller images"),
        ("shapes?seed=" + "9" * 5000, "must be a whole number of at least 0"),
        ("stream:x.tar?timeout=10000000", "must be a whole number from 1 to 1000000"),
        ("stream:x.tar?head=" + "9" * 30, "must be a whole number from 10 to 1000000000"),
        ("shapes?train=x", "train='x'"),
        ("shapes?size=8", "size='8' must be a whole number from 16 to 4096"),
        ("personas?people=81", "people='81' must be a whole number from 2 to 80"),
        ("csv:x.tsv?columns=2", "unknown option 'columns'"),
    ],
)
def test_a_name_that_opens_nothing_is_explained(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(spec)


def test_a_source_in_the_table_opens_and_is_named_in_every_list(monkeypatch, capsys) -> None:
    def opened(request: Request) -> Source:
        source = open_source("demo")
        return Source(f"{request.path} {dict(request.options)}", source.train, None)

    new = SourceType("mine:PLACE", "pairs of mine", opened, (Option("year", "when they were made"),))
    monkeypatch.setattr(sources, "SOURCES", (*sources.SOURCES, new))
    assert open_source("mine:here?year=2025").name == "here {'year': '2025'}"
    with pytest.raises(InputError, match=r"unknown option 'years' in .*; use one of year$"):
        open_source("mine:here?years=2025")
    with pytest.raises(InputError, match=r"Use one of demo, .*wds:SHARDS, stream:SHARDS, mine:PLACE"):
        open_source("nothing")
    assert "| `mine:PLACE` | pairs of mine | `?year=` when they were made |" in sources.sources_markdown()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    help_text = capsys.readouterr().out
    assert "mine:PLACE" in help_text and "?year= when they were made" in help_text


def test_docstring_and_readme_list_the_table() -> None:
    assert inspect.getdoc(open_source).endswith(sources.sources_text())  # type: ignore[union-attr]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert sources.sources_markdown() in readme, "run python -m benchmarks.write_docs"
    for source in sources.SOURCES:
        assert source.usage in sources.sources_text() and source.help in sources.sources_text()


def test_options_in_the_table_are_those_that_a_source_takes(tmp_path) -> None:
    """An option that is listed but not read would be dropped in silence, or be a TypeError."""
    (tmp_path / "t.csv").write_text("a,b\n1.png,a dog\n2.png,a cat\n")
    table = open_source(f"csv:{tmp_path}/t.csv?sep=,&img=a&caption=b&root={tmp_path}&quotes=none").train
    assert [captions[0] for captions in table.captions] == ["a dog", "a cat"]
    shapes = open_source("shapes?train=2&test=1&size=16&seed=3")
    assert (len(shapes.train), len(shapes.test), shapes.train.image(0).size) == (200, 100, (16, 16))  # type: ignore[arg-type]
    people = open_source("personas?people=3&train=2&test=1&size=16&seed=3")
    assert (len(people.train), len(people.test), people.train.image(0).size) == (216, 108, (16, 16))  # type: ignore[arg-type]
    used = {"csv": "sep img caption root quotes", "shapes": "train test size seed", "folder": "classnames"}
    used["personas"] = "people train test size seed"
    used["stream"] = "head buffer timeout"  # test_streams.py, test_remote_streams.py
    used["coco"] = "root"  # these three: test_coco_source.py and test_hugging_face.py
    used["parquet"] = "img caption label id root classnames"
    used["hf"] = f"split {used['parquet']}"
    listed = {s.kind: " ".join(option.name for option in s.options) for s in sources.SOURCES if s.options}
    assert listed == used


def test_templates_need_classes(tmp_path) -> None:
    (tmp_path / "t.tsv").write_text("filepath\ttitle\n1.png\ta dog\n2.png\ta cat\n")
    with pytest.raises(InputError, match="no classes for the templates"):
        open_source(f"csv:{tmp_path}/t.tsv", templates=["a {}"])


def test_demo_digits_have_the_same_split_for_every_seed() -> None:
    source, again = open_source("demo"), open_source("demo", seed=7)
    assert source.test is not None and again.test is not None
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.test.ids == again.test.ids
    assert not set(source.train.ids) & set(source.test.ids)
    assert source.train.labels is not None and source.test.labels is not None
    assert np.bincount(source.test.labels).min() >= 34
    assert source.train.classes is not None and source.train.classes[7] == "seven"
    seven = int(np.flatnonzero(source.train.labels == 7)[0])
    assert len(source.train.captions[seven]) >= 3
    assert all("seven" in caption for caption in source.train.captions[seven])
    assert source.train.class_prompts("seven") == list(source.train.captions[seven])
    image = source.train.image(0)
    assert image.mode == "RGB" and image.size == (8, 8) and np.asarray(image).max() > 200


def test_shapes_are_a_hundred_classes_in_seeded_splits() -> None:
    source = open_source("shapes")
    assert source.test is not None and source.train.labels is not None
    assert (len(source.train), len(source.test)) == (10000, 2000)
    assert source.train.classes == CLASSES and len(set(CLASSES)) == 100
    assert "red circle" in CLASSES
    assert source.train.captions[0] == ("a red circle",)
    assert np.bincount(source.train.labels).tolist() == [100] * 100
    assert source.train.image(0).size == (32, 32)


def test_shapes_depend_on_the_seed_and_not_on_how_many_there_are() -> None:
    few, more = open_source("shapes?train=2&test=1"), open_source("shapes?train=3&test=1")
    other = open_source("shapes?train=2&test=1&seed=1")
    assert few.test is not None
    assert few.train.image(3).tobytes() == more.train.image(4).tobytes()  # red square, the second one
    assert few.train.image(0).tobytes() != few.test.image(0).tobytes()
    assert few.train.image(0).tobytes() != other.train.image(0).tobytes()
    assert few.train.fingerprint() != other.train.fingerprint()
    assert other.train.fingerprint() == open_source("shapes?train=2&test=1", seed=1).train.fingerprint()


def test_shape_size_is_an_option() -> None:
    assert open_source("shapes?train=1&test=1&size=48").train.image(0).size == (48, 48)


def test_colours_and_shapes_can_be_distinguished() -> None:
    """The colour by the mean tint of what stands out, the shape by the most similar outline."""
    source = open_source("shapes?train=10&test=3")
    assert source.test is not None and source.train.labels is not None and source.test.labels is not None
    colours = np.array(list(COLOURS.values()), dtype=float)

    def features(pairs) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([np.asarray(pairs.image(i), dtype=float) for i in range(len(pairs))])
        ground = np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)[:, None, None]
        away = np.linalg.norm(images - ground, axis=-1)  # [n, 32, 32]
        ink = away > 0.6 * np.quantile(away, 0.98, axis=(1, 2))[:, None, None]
        tint = np.stack([image[mask].mean(0) for image, mask in zip(images, ink, strict=True)])
        outlines = []
        for mask in ink:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            at = [np.linspace(0, side - 1, 12).round().astype(int) for side in box.shape]
            outlines.append([*box[np.ix_(*at)].ravel(), 3 * box.shape[0] / box.shape[1]])
        return tint, np.array(outlines, dtype=float)

    _, train_outline = features(source.train)
    tint, outline = features(source.test)
    guess = np.argmin(np.linalg.norm(tint[:, None] - 0.925 * colours, axis=-1), axis=1)
    assert (guess == source.test.labels // len(SHAPES)).mean() > 0.9
    distance = torch.cdist(torch.as_tensor(outline), torch.as_tensor(train_outline))  # [300, 1000]
    nearest = source.train.labels[distance.argmin(dim=1).numpy()] % len(SHAPES)
    assert (nearest == source.test.labels % len(SHAPES)).mean() > 0.85


def test_an_option_is_added_to_the_name_of_a_source_that_has_it() -> None:
    assert sources.with_option("folder:/x", "classnames", "/a&b.txt") == "folder:/x?classnames=/a%26b.txt"
    assert sources.with_option("parquet:/x?img=a", "classnames", "n") == "parquet:/x?img=a&classnames=n"
    assert sources.with_option("demo", "classnames", None) == "demo"
    assert sources.with_option("folder:/x#class:a", "classnames", "n") == "folder:/x?classnames=n#class:a"
    assert sources.with_option("demo#class:one", "classnames", None) == "demo#class:one"
    with pytest.raises(InputError, match="the source 'demo' has no option 'classnames'; folder:DIR, hf:DIR, parquet"):
        sources.with_option("demo", "classnames", "n")
    with pytest.raises(InputError, match="already has classnames='m'; give it once"):
        sources.with_option("folder:/x?classnames=m", "classnames", "n")


def test_class_names_of_the_command_line_reach_the_source(tmp_path: Path, capsys) -> None:
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "names.txt").write_text("n01443537 goldfish\n")
    words = ["--model", "local-dir:x", "--data", f"folder:{tmp_path}", "--class-names", f"{tmp_path}/names.txt"]
    assert cli.main(["evaluate", *words]) == 2
    assert "the file of class names has no line for the folder 'n01440764'" in capsys.readouterr().err
