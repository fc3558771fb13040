from types import SimpleNamespace

import pytest
from unaided_runs import audited

from cliperase_fast.benchmarks import unaided
from cliperase_fast.errors import UnlearningError


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the benchmark unlearns and audits, in place of doing so, and the folder of its records."""
    seen = SimpleNamespace(unlearned=[], audits=[], originals=[], fail=None, folder=tmp_path)

    def forget(model, forget, retain, **settings):
        seen.unlearned.append((model, forget, retain, settings))
        if seen.fail is not None and seen.fail(settings):
            raise UnlearningError("it broke")
        automatic = "learning_rate" not in settings
        recipe = {
            "learning_rate": 3.16228e-05, "steps": 60, "stop": "s", "target": {"association": 0.1},
            "probes": [{"steps": 30}, {"steps": 10}],
        }  # fmt: skip
        steps = 60 if automatic else settings.get("steps", 20)
        return SimpleNamespace(
            record={"recipe": recipe if automatic else None},
            selection={
                "step": 40 if automatic else steps, "target_reached": True, "within_floor": True, "reason": "r",
            },
            config=SimpleNamespace(
                learning_rate=settings.get("learning_rate"), batch_size=128, forget_fraction=0.25,
            ),
            history=[{"total": 1.0, "step": step} for step in (1, steps)] + [{"total": 1.0, "step": 99, "probe": 1.0}],
            adapter=f"after {settings['method']}",
        )  # fmt: skip

    def audit(*models, **options):
        seen.audits.append((models, options))
        return audited()

    monkeypatch.setattr(unaided, "RESULTS", tmp_path)
    monkeypatch.setattr(unaided, "unlearn", forget)
    monkeypatch.setattr(unaided, "audit", audit)
    monkeypatch.setattr(unaided, "load_model", lambda name: f"loaded {name}")
    return seen
