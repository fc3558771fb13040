"""Finding pairs by a question to the model: `select_by_query()` and the command `select`."""

import numpy as np
import pytest
import torch
from models.tiny_models import picture, tiny_open_clip
from PIL import Image

import cliperase_fast as cf
from cliperase_fast import cli
from cliperase_fast.data import open_source, select
from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.ranking import best_rows, cosines, mean_query
from cliperase_fast.models import load_model


@pytest.fixture(scope="module")
def model():
    return tiny_open_clip()


@pytest.fixture
def folder(tmp_path):
    """40 pictures in two classes."""
    for number in range(40):
        path = tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "data"


def transform(image):
    return torch.from_numpy(np.asarray(image.resize((16, 16)), dtype=np.float32) / 255 - 0.5).permute(2, 0, 1)


def query(model, data, text="a photo of a cat", **settings):
    return cf.select_by_query(model, data, text, transform=transform, progress=False, batch_size=7, **settings)


def test_the_best_rows_agree_with_a_sort_and_keep_the_order_of_equal_ones():
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(features[torch.arange(100) % 60], dim=1)  # some rows twice
    direction = torch.nn.functional.normalize(torch.ones(1, 8), dim=1)
    expected = np.argsort(-(features @ direction[0]).numpy(), kind="stable")
    found = cosines([features], mean_query(direction), 100)
    for k in (1, 7, 99, 200):
        assert best_rows(found, k=k).tolist() == expected[:k].tolist()
    parts = cosines(features.half().split(9), direction[0], 100)
    np.testing.assert_allclose(parts, (features @ direction[0]).numpy(), atol=2e-3)


def test_best_rows_leaves_out_nan_and_what_is_below_the_threshold():
    values = np.array([0.3, np.nan, 0.9, 0.3, 0.1], dtype=np.float32)
    assert best_rows(values, k=3).tolist() == [2, 0, 3]
    assert best_rows(values, k=2).tolist() == [2, 0]
    assert best_rows(values, threshold=0.3).tolist() == [2, 0, 3]
    assert best_rows(values, k=1, threshold=0.2).tolist() == [2]


def test_a_query_ranks_by_the_models_own_similarity(model, folder):
    found = query(model, f"folder:{folder}", k=5)
    pairs = open_source(f"folder:{folder}").train
    with torch.no_grad():
        pixels = torch.stack([transform(pairs.image(row)) for row in range(len(pairs))])
        tokens = load_model(model).token_ids(["a photo of a cat"])
        text = model.encode_text(tokens, normalize=True)
        expected = (model.encode_image(pixels, normalize=True) @ text[0]).numpy()
    np.testing.assert_allclose(found.similarities, expected, atol=1e-5)
    assert found.ids == [pairs.ids[row] for row in np.argsort(-expected)[:5]]
    assert len(found.rest) == 35 and set(found.rest.ids) & set(found.ids) == set()


def test_an_example_image_finds_itself_first(model, folder):
    path = folder / "cat" / "07.png"
    assert query(model, f"folder:{folder}", path, k=3).ids[0] == "cat/07.png"
    assert query(model, f"folder:{folder}", Image.open(path), threshold=0.9999).ids[0] == "cat/07.png"


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "I;16", "F"])
def test_an_example_image_is_decoded_like_those_of_the_data(model, mode):
    images = []
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 65536, (20, 20, 4))
        pixels = {"I;16": values[..., 0].astype(np.uint16), "F": (values[..., 0] / 65535).astype(np.float32)}
        images.append(Image.fromarray(pixels.get(mode, (values // 256).astype(np.uint8))))
        if mode not in pixels:
            images[-1] = images[-1].convert(mode)
    found = query(model, [(image, "a cat") for image in images], images[4], k=1)
    assert found.ids == ["4"] and found.similarities[4] == pytest.approx(1, abs=1e-5)


def test_an_example_image_of_another_form_is_refused(model, folder):
    pixels = transform(picture())
    for image, said in ((pixels[None], r"is a tensor \[1, 3, 16, 16\]"), (pixels.byte(), "must be float")):
        with pytest.raises(InputError, match=f"the example image .*{said}"):
            query(model, f"folder:{folder}", image, k=3)


def test_kept_features_answer_without_the_images(model, folder, tmp_path):
    file = tmp_path / "kept.features"
    first = query(model, f"folder:{folder}", k=5, features=file)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"gone")
    again = query(model, f"folder:{folder}", k=5, features=file)
    assert again.ids == first.ids
    np.testing.assert_allclose(again.similarities, first.similarities, atol=1e-6)
    with pytest.raises(InputError, match=r"\.png"):
        query(tiny_open_clip(seed=1), f"folder:{folder}", k=5, features=file)  # another model's are not used


def test_kept_features_are_not_those_of_other_images_or_of_another_transform(model, tmp_path):
    file = tmp_path / "kept.features"
    first, others = ([(picture(start + number), "a cat") for number in range(8)] for start in (0, 100))
    query(model, first, k=3, features=file)
    np.testing.assert_array_equal(
        query(model, others, k=3, features=file).similarities, query(model, others, k=3).similarities
    )
    negative = cf.select_by_query(model, others, "a cat", transform=lambda image: -transform(image), k=3, features=file)
    fresh = cf.select_by_query(model, others, "a cat", transform=lambda image: -transform(image), k=3)
    np.testing.assert_array_equal(negative.similarities, fresh.similarities)


def test_given_features_must_be_unit_rows_of_the_models_width(model):
    pairs = [(picture(number), "a cat") for number in range(8)]
    unit = torch.nn.functional.normalize(torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    assert len(query(model, pairs, k=3, features=unit.bfloat16())) == 3
    for features, said in (
        (unit[:, :7], r"features have width 24: give \[8, 24\]"),
        (5 * unit, r"lengths from 5 to 5, not 1"),
        (unit.long(), "dense floating-point"),
        (unit.to("meta"), "dense floating-point"),
        (unit.numpy(), "must be the name of a file, or a tensor"),
        ("", "must be the name of a file, or a tensor"),
    ):
        with pytest.raises(InputError, match=said):
            query(model, pairs, k=3, features=features)


def test_features_that_cannot_be_written_are_an_error_with_a_remedy_of_queries(model, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cf.UnlearningError, match=r"cannot write .*; or leave out features=") as error:
        query(model, f"folder:{folder}", k=3, features=tmp_path / "file" / "kept.features")
    assert "teacher_cache" not in str(error.value)


@pytest.mark.parametrize("name", ["mine.json", "mine.txt", "mine.features", "mine"])
def test_features_replace_no_file_that_holds_something_else(model, folder, tmp_path, name):
    """The note of the features in mine.features would be mine.json."""
    for file in ("mine.json", "mine.txt"):
        (tmp_path / file).write_text('{"my": "annotations"}')
    with pytest.raises(InputError, match=r"features=.* would replace .*mine\.(json|txt), which does not hold features"):
        query(model, f"folder:{folder}", k=5, features=tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} - {folder.name} == {"mine.json", "mine.txt"}
    assert all((tmp_path / file).read_text() == '{"my": "annotations"}' for file in ("mine.json", "mine.txt"))


def test_features_of_other_data_and_of_a_killed_process_are_replaced(model, folder, tmp_path):
    file = tmp_path / "kept.features"
    query(model, f"folder:{folder}#class:cat", k=5, features=file)
    assert query(model, f"folder:{folder}", k=5, features=file).ids == query(model, f"folder:{folder}", k=5).ids
    (tmp_path / "kept.json").unlink()
    assert query(model, f"folder:{folder}", k=5, features=file).ids == query(model, f"folder:{folder}", k=5).ids
    file.write_bytes(b"something else")
    (tmp_path / "kept.json").unlink()
    with pytest.raises(InputError, match=r"would replace .*kept\.features"):
        query(model, f"folder:{folder}", k=5, features=file)


def test_names_that_do_not_fit_into_a_file_of_ids_are_refused(model, folder, tmp_path):
    (folder / "cat" / "01.png").rename(folder / "cat" / "0\r1.png")
    with pytest.raises(InputError, match=r"'cat/0\\r1.png' does not fit into a file of ids"):
        query(model, f"folder:{folder}", k=39).save_ids(tmp_path / "ids.txt")


def test_queries_that_cannot_be_answered_are_refused(model, folder):
    data = f"folder:{folder}"
    with pytest.raises(InputError, match=r"no pair of .* has a similarity of 0.999 to 'a photo of a cat': the highest"):
        query(model, data, threshold=0.999)
    with pytest.raises(InputError, match=r"all 40 pairs .* nothing would be left"):
        query(model, data, k=40)
    with pytest.raises(InputError, match="give k="):
        query(model, data)
    with pytest.raises(InputError, match="threshold=3 must be a cosine"):
        query(model, data, threshold=3)
    with pytest.raises(InputError, match=r"k=2\.5 must be a whole number of at least 1"):
        query(model, data, k=2.5)
    with pytest.raises(InputError, match="empty text"):
        query(model, data, " ", k=3)
    (folder / "dog" / "00.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"00\.png.* or pass on_error='skip' to leave such images out"):
        query(model, data, k=3)
    for function in (query, lambda model, data, **settings: cf.evaluate(model, data)):
        with pytest.raises(InputError, match=r"'stream:\{0..9\}.tar' is read one pair after another.* only as retain"):
            function(model, "stream:{0..9}.tar", k=3)
    skipping = query(model, data, k=3, on_error="skip")
    assert len(skipping.pairs) == 39
    assert sum(row["count"] for row in skipping.skipped.values()) == 1


def test_a_query_that_is_too_long_is_refused_and_long_captions_are_not_read(model, folder, tmp_path):
    with pytest.raises(InputError, match=r"the query has 82 tokens .* context holds 16: shorten it"):
        query(model, f"folder:{folder}", "red " * 80, k=3)
    pairs = [(picture(number), "red " * 80) for number in range(5)]
    assert query(model, pairs, k=2, features=tmp_path / "features").ids == query(model, pairs, k=2).ids


def test_the_test_split_is_searched_too(model, folder):
    (folder / "cat").rename(folder.parent / "cat")
    for split in ("train", "test"):
        (folder / split).mkdir()
    (folder.parent / "cat").rename(folder / "train" / "cat")
    (folder / "dog").rename(folder / "test" / "cat")
    found = query(model, f"folder:{folder}", k=5)
    assert all(name.startswith("train/") for name in found.ids)
    alone = query(model, f"folder:{folder / 'test'}", k=19)  # all but one
    cut = found.similarities[found.rows[-1]]
    near = [f"test/{name}" for name, row in zip(alone.ids, alone.rows, strict=True) if alone.similarities[row] >= cut]
    assert sorted(found.also) == sorted(near) and 0 < len(near) < len(alone.ids)


def test_the_command_writes_ids_that_a_selector_reads_and_a_page(model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cliperase_fast.querying.load_model", lambda *args, **kwargs: loaded(model))
    output = tmp_path / "found ids.txt"
    words = ["select", "--model", "m", "--data", f"folder:{folder}", "--query", "<b>red</b> cars", "--k", "6"]
    assert cli.main([*words, "--output", str(output), "--quiet"]) == 0
    pairs = open_source(f"folder:{folder}").train
    assert select(pairs, f"ids:{output}").sum() == 6
    page = output.with_suffix(".html").read_text()
    assert page.count("data:image/jpeg") == 6 + 24 and "&lt;b&gt;red&lt;/b&gt; cars" in page and "<b>red" not in page
    told = capsys.readouterr().out
    assert f"--forget 'ids:{output}' --output DIR" in told and f"--data folder:{folder} " in told
    words[4] = f"folder:{folder}#caption:cat,dog"
    (folder / "owl").mkdir()
    picture(99).save(folder / "owl" / "99.png")
    assert cli.main([*words, "--output", str(output)]) == 0
    assert f"--data folder:{folder} " in capsys.readouterr().out  # of which the file of ids selects
    page = tmp_path / "page.html"
    assert cli.main([*words, "--output", str(page)]) == 2 and not page.exists()
    assert "is for the ids, and a page of that name is written too" in capsys.readouterr().err
    for features, written in ((output, output), (page, output.with_name("page"))):
        assert cli.main([*words, "--features", str(features), "--output", str(written)]) == 2
        assert f"--features={features} and {features}, which --output writes" in capsys.readouterr().err
    (tmp_path / "taken.html").mkdir()
    assert cli.main([*words, "--output", str(tmp_path / "taken")]) == 2
    assert "taken.html is a folder; give a file" in capsys.readouterr().err and not (tmp_path / "taken").exists()
    assert cli.main([*words[:5], "--k", "3", "--output", str(output)]) == 2
    assert "give --query TEXT or --like FILE" in capsys.readouterr().err


def loaded(model):
    adapter = load_model(model)
    adapter.transform = transform
    return adapter
