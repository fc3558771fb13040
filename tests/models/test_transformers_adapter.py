"""transformers' CLIPModel: features as its own calls give them, padding, tokenizer, processor, saving."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from tiny_models import picture, pixels_for, tiny_clip, word_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    CLIPVisionModel,
)

from cliperase_fast.errors import InputError
from cliperase_fast.models import load_model

SENTENCES = ["a dog", "a photo of a red cat", "red"]
CAPTIONS = ["A photo of a dog.", "two  small, round cats!", "it's 42 o'clock — naïve café", "<3 :-) #tag", ""]


def clip_vocabulary(**text: Any) -> CLIPModel:
    return tiny_clip(vocab_size=49408, bos_token_id=49406, **{"eos_token_id": 49407, "pad_token_id": 1, **text})


@pytest.fixture(scope="module")
def real_clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer with CLIP's vocabulary, taken from open_clip's copy of it."""
    simple, folder = open_clip.SimpleTokenizer(), tmp_path_factory.mktemp("tokenizer")
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): index for token, index in simple.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in simple.bpe_ranks)
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def own_features(output: Any) -> torch.Tensor:
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features / features.norm(dim=1, keepdim=True)


def test_features_are_the_models_own_normalised() -> None:
    model = tiny_clip()
    adapter = load_model(model, tokenizer=word_tokenizer())
    assert adapter.kind == "transformers"
    pixels = pixels_for(model)
    torch.testing.assert_close(
        adapter.encode_image(pixels),
        own_features(model.get_image_features(pixel_values=pixels)),
        atol=1e-6,
        rtol=0,
    )
    batch = word_tokenizer()(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert (batch["attention_mask"] == 0).any()
    found = adapter.encode_text(adapter.tokenize(SENTENCES))
    torch.testing.assert_close(found, own_features(model.get_text_features(**batch)), atol=1e-6, rtol=0)
    assert adapter.logit_scale().item() == pytest.approx(model.logit_scale.exp().item())


def test_an_output_object_and_a_plain_tensor_are_both_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip()
    adapter = load_model(model, tokenizer=word_tokenizer())
    pixels, tokens = pixels_for(model), adapter.tokenize(SENTENCES)
    image, text = adapter.encode_image(pixels), adapter.encode_text(tokens)
    raw = (
        own_features(model.get_image_features(pixel_values=pixels)),
        own_features(model.get_text_features(input_ids=tokens)),
    )
    monkeypatch.setattr(model, "get_image_features", lambda pixel_values: raw[0])
    monkeypatch.setattr(model, "get_text_features", lambda input_ids: raw[1])
    torch.testing.assert_close(adapter.encode_image(pixels), image)
    torch.testing.assert_close(adapter.encode_text(tokens), text)


@pytest.mark.parametrize("end", [49407, 2])
def test_clips_vocabulary_needs_no_tokenizer_open_clips_gives_the_same_features(
    end: int, real_clip_tokenizer: Any
) -> None:
    """eos_token_id 2 stands in old configurations, whose models pool at the highest id."""
    model = clip_vocabulary(eos_token_id=end)
    adapter = load_model(model)
    assert isinstance(adapter.tokenizer.source, open_clip.SimpleTokenizer)
    batch = real_clip_tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    expected = own_features(model.get_text_features(**batch))
    torch.testing.assert_close(adapter.encode_text(adapter.tokenize(CAPTIONS)), expected, atol=1e-6, rtol=0)


def test_another_vocabulary_needs_a_tokenizer() -> None:
    for model in (tiny_clip(), clip_vocabulary(eos_token_id=7)):
        with pytest.raises(InputError, match="pass tokenizer="):
            load_model(model).tokenize(SENTENCES)


def test_tokens_without_the_end_token_are_refused() -> None:
    adapter = load_model(tiny_clip(), tokenizer=lambda captions: torch.tensor([[8, 2, 9], [8, 2, 2]]))
    with pytest.raises(InputError, match=r"without the end token \(id 9\)"):
        adapter.tokenize(["a", "b"])


def test_captions_longer_than_the_context_are_refused() -> None:
    adapter = load_model(tiny_clip(), tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="has 22 tokens"):
        adapter.tokenize([" ".join(["dog"] * 20)])
    assert adapter.tokenize([" ".join(["dog"] * 20)], truncate=True)[0, -1] == 9


def test_the_default_transform_is_clips_at_the_models_size() -> None:
    transform = load_model(tiny_clip()).transform
    found = transform(picture().convert("L"))
    assert found.shape == (3, 16, 16)
    expected = open_clip.image_transform(16, is_train=False)(picture().convert("L"))
    assert (found - expected).abs().max() < 0.1  # resizing rounds differently
    torch.testing.assert_close(transform(picture()), transform(picture()))
    torch.testing.assert_close(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


def test_save_and_load_with_tokenizer_and_processor(tmp_path: Path) -> None:
    model = tiny_clip()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.5] * 3,
        image_std=[0.1] * 3,
    )
    adapter = load_model(model, tokenizer=word_tokenizer(), transform=processor)
    adapter.save(tmp_path / "model")

    loaded = CLIPModel.from_pretrained(tmp_path / "model")
    pixels = pixels_for(model)
    torch.testing.assert_close(
        own_features(loaded.get_image_features(pixel_values=pixels)),
        adapter.encode_image(pixels),
        atol=1e-6,
        rtol=0,
    )
    again = load_model(str(tmp_path / "model"))
    assert again.kind == "transformers"
    assert again.identity() == adapter.identity()
    assert not again.module.training
    assert torch.equal(again.tokenize(SENTENCES), adapter.tokenize(SENTENCES))
    torch.testing.assert_close(again.transform(picture()), adapter.transform(picture()))
    again.save(tmp_path / "model")
    assert load_model(tmp_path / "model").identity() == adapter.identity()


def test_a_folder_with_a_whole_processor(tmp_path: Path, real_clip_tokenizer: Any) -> None:
    model = tiny_clip()
    model.save_pretrained(tmp_path)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = CLIPProcessor(image_processor, real_clip_tokenizer)
    processor.save_pretrained(tmp_path)
    from_folder, given = load_model(tmp_path), load_model(model, tokenizer=processor, transform=processor)
    torch.testing.assert_close(from_folder.transform(picture()), given.transform(picture()))
    assert from_folder.tokenizer.source.get_vocab() == given.tokenizer.source.get_vocab()


def test_a_folder_with_the_processor_of_another_model_uses_that_one(tmp_path: Path) -> None:
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 16})
    adapter = load_model(tiny_clip(), tokenizer=word_tokenizer(), transform=processor)
    adapter.save(tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").transform(picture()), adapter.transform(picture()))


def test_weights_saved_in_half_precision_are_widened(tmp_path: Path) -> None:
    tiny_clip().half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).module.parameters()} == {torch.float32}


def test_folders_without_a_complete_clip_model_are_refused(tmp_path: Path) -> None:
    model = tiny_clip()
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="does not load"):
        load_model(tmp_path / "whole")

    CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path / "vision")
    with pytest.raises(InputError, match="type 'clip_vision_model'"):
        load_model(tmp_path / "vision")

    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "vision" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="none of its 39 tensors has a name of this architecture"):
        load_model(tmp_path / "vision")
    (tmp_path / "vision" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        load_model(tmp_path / "vision")


def test_without_transformers_the_folder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install '\.\[transformers\]'"):
        load_model(tmp_path)


def test_a_clone_is_independent() -> None:
    adapter = load_model(tiny_clip())
    twin, identity = adapter.clone(), adapter.identity()
    with torch.no_grad():
        twin.module.logit_scale.add_(1)
    assert adapter.identity() == identity != twin.identity()


def test_saving_keeps_what_libraries_print_off_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = CLIPModel.save_pretrained

    def chatty(self: CLIPModel, *given: Any, **options: Any) -> None:
        print("a library found no accelerator")
        own(self, *given, **options)

    monkeypatch.setattr(CLIPModel, "save_pretrained", chatty)
    load_model(tiny_clip(), tokenizer=word_tokenizer()).save(tmp_path / "model")
    told = capsys.readouterr()
    assert told.out == "" and "a library found no accelerator" in told.err
