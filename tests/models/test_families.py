"""The table of model families: a new entry is opened, matched, named in messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cliperase_fast.errors import InputError
from cliperase_fast.models import adapters, load_model, loading
from cliperase_fast.models.adapters.base import Family
from cliperase_fast.models.adapters.generic import GenericAdapter


class Sums(nn.Module):
    """A model with encoders of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def image_sums(self, pixels: Tensor) -> Tensor:
        return pixels.sum((2, 3)) * self.logit_scale.exp()


class SumsAdapter(GenericAdapter):
    kind = "sums"

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._model.image_sums(pixels)


def load_sums(text: str, options: dict[str, Any]) -> SumsAdapter:
    return SumsAdapter(Sums(), **options)


SUMS = Family(
    name="sums",
    instance="a Sums",
    strings=("'sums:'",),
    marker="sums.json",
    matches=lambda module: isinstance(module, Sums),
    wrap=SumsAdapter,
    opens=lambda text: text.startswith("sums:") or (Path(text) / "sums.json").is_file(),
    load=load_sums,
)


@pytest.fixture
def with_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    families = (SUMS, *adapters.FAMILIES)
    for module in (adapters, loading):
        monkeypatch.setattr(module, "FAMILIES", families)


def test_a_family_in_the_table_is_loaded_from_its_strings_folders_and_modules(with_sums: None, tmp_path: Path) -> None:
    (tmp_path / "sums.json").touch()
    for model in ("sums:", tmp_path, Sums()):
        adapter = load_model(model)
        assert adapter.kind == "sums"
        assert adapter.encode_image(torch.ones(2, 3, 4, 4)).shape == (2, 3)


def test_messages_name_every_family_in_the_table(with_sums: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model 'nowhere'; pass 'sums:', 'ViT-B-32:openai'"):
        load_model("nowhere")
    with pytest.raises(
        InputError, match=r"neither sums\.json \(sums\) nor open_clip_config\.json \(open_clip\) nor config"
    ):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"none of the supported models \(a Sums, an open_clip model, .*has no encode"):
        load_model(nn.Linear(2, 2))


def test_a_transformers_folder_of_another_type_names_the_supported_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "flava"}')
    known = "'clip', 'siglip', 'siglip2', 'chinese_clip', 'blip'"
    with pytest.raises(InputError, match=rf"holds a transformers model of type 'flava'; supported are {known}$"):
        load_model(tmp_path)
    sums = replace(SUMS, opens=lambda text: False, model_type="sums")
    monkeypatch.setattr(loading, "FAMILIES", (*adapters.FAMILIES, sums))
    with pytest.raises(InputError, match=rf"type 'flava'; supported are {known}, 'sums'$"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="is not readable JSON"):
        load_model(tmp_path)


def test_every_family_has_its_own_name_and_says_how_its_models_are_named() -> None:
    families = adapters.FAMILIES
    assert len({family.name for family in families}) == len(families)
    assert all(family.strings and family.marker and family.instance for family in families)
    assert all(family.wrap.kind == family.name for family in families)  # type: ignore[attr-defined]
    assert all(text in adapters.accepted_strings() for family in families for text in family.strings)
