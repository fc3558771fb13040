"""A fact goes, and neither the person's other facts nor other people's. On rendered people, seeded."""

import pytest

from cliperase_fast.auditing import audit
from cliperase_fast.demo import cached_small_clip, run_demo
from cliperase_fast.demo_models import demo_model_for


@pytest.mark.long
def test_telephone_numbers_go_and_general_knowledge_stays(tmp_path, model_cache):
    forget = "personas#class:person 0* phone"
    result = run_demo(forget, tmp_path / "run", cache_dir=model_cache, report=False)
    assert result.before["forget"]["zero_shot_top1"] >= 0.8
    assert result.after["forget"]["zero_shot_top1"] <= 0.05
    assert result.after["retain"]["zero_shot_top1"] >= result.before["retain"]["zero_shot_top1"] - 0.03
    before = cached_small_clip("personas", demo_model_for("personas"), cache_dir=model_cache)
    scores = audit(f"local-dir:{before}", f"local-dir:{tmp_path / 'run' / 'model'}", forget, "rest").scores
    after = scores["after"]["collateral"]
    assert after["general"]["value"] >= scores["before"]["collateral"]["general"]["value"] - 0.05
    assert after["visual_identity"]["value"] >= 0.5
    assert {"intra_identity", "inter_identity"} <= after.keys()
