"""The saved audit: audit.json, audit.html, and reading them again."""

import json
import warnings
from dataclasses import replace

import pytest
from small import SYNONYMS, make_model, make_pairs, training_and_test, without_red

from cliperase_fast.auditing import Audit, audit, relearning, result
from cliperase_fast.auditing.estimates import Estimate
from cliperase_fast.auditing.gap import over_forgotten_below
from cliperase_fast.errors import InputError
from cliperase_fast.report import audit_html
from cliperase_fast.report.audit_scores import SCORES, find_score


@pytest.fixture(scope="module")
def found():
    forget, retain, test = training_and_test()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relearning, "STEPS", (0, 1))
        patch.setattr(relearning, "DRAWS", 1)
        return audit(
            make_model(), without_red(), forget, retain, test=test, synonyms=SYNONYMS, progress=False, depth="full",
            oracle=[without_red(seed) for seed in (0, 1)],
            other={"grey & others": make_pairs(4, seed=3, colours=("grey", "blue"))},
        )  # fmt: skip


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    return found.save(tmp_path_factory.mktemp("audit") / "deeper")


def test_a_saved_audit_is_read_again_as_it_was(found, folder):
    for path in (folder, folder / "audit.json", str(folder)):
        assert Audit.load(path) == found
    assert Audit.from_dict(found.to_dict()) == found
    assert Audit.load(folder).summary() == found.summary()


def test_the_page_of_a_loaded_audit_is_that_of_the_live_one(found, folder):
    saved = (folder / "audit.html").read_text("utf-8")
    assert Audit.load(folder).html() == saved  # written from the live one
    assert "grey &amp; others" in saved


def test_the_evidence_of_all_models_is_saved(found):
    assert set(found.evidence) == {"similarities", "per_class"}
    assert set(found.evidence["similarities"]) == {"before", "after", "oracle 1", "oracle 2"}
    assert sum(found.evidence["similarities"]["after"]["other"]["counts"]) == 8
    rows = {row["set"]: row for row in found.evidence["per_class"].values()}
    assert set(rows) == {"forget", "retain"}
    assert rows["forget"] == {"set": "forget", "pairs": 8, "before": 1.0, "after": 0.0, "oracle": 0.0}


def test_every_score_is_in_the_table_that_explains_it(found):
    names = [name for group in found.scores["after"].values() for name in group]
    assert [name for name in names if not find_score(name).meaning] == []
    families = {name for name in SCORES if name[-1] in "@:"}
    left = {name for name in SCORES if name not in families} - set(names)
    about_entities = {"intra_identity", "inter_identity", "visual_identity", "general"}
    assert left == {"association_separability", *about_entities}  # only with holdouts or entities
    assert all(any(name.startswith(family) for name in names) for family in families)


def test_the_limit_of_over_forgetting_is_kept(found):
    lowest = min(found.scores[name]["forgetting"]["association"]["value"] for name in ("oracle 1", "oracle 2"))
    assert found.over_forgotten_below == pytest.approx(lowest - 0.05)
    assert found.over_forgotten is False


def test_the_limit_is_nearer_in_a_model_with_a_large_logit_scale():
    oracles = [{"forgetting": {"association": Estimate(value)}} for value in (0.25, 0.2)]
    assert [over_forgotten_below(oracles, None, scale) for scale in (4.0, 26.0, 104.0)] == pytest.approx(
        [0.15, 0.15, 0.1875]
    )
    assert [over_forgotten_below([], 0.2, scale) for scale in (26.0, 104.0)] == pytest.approx([0.1, 0.175])
    assert over_forgotten_below([], None, 104.0) is None


def test_an_audit_without_the_later_keys_is_read(found):
    content = found.to_dict()
    for key in ("notes", "data", "over_forgotten_below", "evidence"):
        del content[key]
    assert Audit.from_dict(content).evidence == {}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an audit"),
        ('{"format": 1}', "is not an audit"),
        (None, "has format 2, and this version reads 1"),
    ],
)
def test_other_files_are_refused_with_the_remedy(found, tmp_path, text, error):
    text = json.dumps({**found.to_dict(), "format": 2}) if text is None else text
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(InputError, match=error) as caught:
        Audit.load(tmp_path)
    assert "audit.json" in str(caught.value)
    with pytest.raises(InputError, match=r"cannot read the audit .*elsewhere"):
        Audit.load(tmp_path / "elsewhere")


def test_scores_are_saved_though_the_page_fails(found, tmp_path, monkeypatch):
    def fails(content):
        raise RuntimeError("no ink")

    monkeypatch.setattr(result, "audit_page", fails)
    with pytest.warns(UserWarning, match=r"audit\.html is missing: RuntimeError: no ink"):
        found.save(tmp_path)
    assert Audit.load(tmp_path) == found


def test_names_that_are_not_unicode_are_saved(found, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_html, "picture", lambda *rest: None)
    odd = replace(found, evidence={}, data={"concepts": ["bad \udcff name"]}, notes=["\ud800"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd.save(tmp_path)
    assert Audit.load(tmp_path).html() == odd.html()


def test_the_summary_has_the_verdicts_the_scores_and_the_notes(found):
    text = replace(found, notes=["A note."]).summary()
    for said in (*found.verdicts.values(), *found.scores["after"]["depth"], "A note."):
        assert said in text
