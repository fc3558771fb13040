"""Whether a text tower knows words from elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cliperase_fast.errors import InputError
from cliperase_fast.evaluation.words import SYNONYMS, known_synonyms, knows_words

WORDS = [word for pair in SYNONYMS for word in pair]


def tower(known: int):
    """An adapter whose text tower has features of its own for every word, but for the synonyms that it knows."""
    own = torch.eye(len(WORDS))
    for pair in range(known):
        own[2 * pair + 1] = own[2 * pair] + 0.1 * own[2 * pair + 1]

    def tokenize(captions, *, truncate=None):
        assert truncate is False  # nothing must be noted as cut
        return torch.tensor([WORDS.index(caption) for caption in captions])

    # Words that are not known are nearest to the first one of the next pair.
    own[2 * known + 1 :: 2] = own[2 * known : len(WORDS) : 2].roll(-1, 0)
    return SimpleNamespace(tokenize=tokenize, encode_text=lambda tokens: own[tokens])


@pytest.mark.parametrize("known", [0, 5, 12, 22])
def test_synonyms_are_counted_that_are_nearest_to_their_word(known):
    adapter = tower(known)
    assert known_synonyms(adapter) == known
    assert knows_words(adapter) == (known >= 12)


@pytest.mark.parametrize("error", [KeyError("couch"), InputError("too long"), IndexError])
def test_a_tokenizer_that_cannot_read_the_words_knows_none(error):
    def tokenize(captions, *, truncate=None):
        raise error

    assert not knows_words(SimpleNamespace(tokenize=tokenize))


def test_towers_that_fail_are_not_taken_for_ignorant():
    def encode_text(tokens):
        raise MemoryError

    with pytest.raises(MemoryError):
        known_synonyms(SimpleNamespace(tokenize=tower(3).tokenize, encode_text=encode_text))


def test_the_words_of_a_pair_share_no_beginning():
    assert len(set(WORDS)) == len(WORDS)
    assert all(one[:4] != other[:4] for one, other in SYNONYMS)
