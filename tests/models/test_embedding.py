"""Only the token rows that occur are trained, with the result of training the whole table."""

import copy

import pytest
import torch
from tiny_models import CAPTIONS, TwoTowers, tiny_clip, tiny_open_clip

from cliperase_fast.models import load_model, set_trainable
from cliperase_fast.models.fast_paths.embedding import RowsOfEmbedding, merge_rows, train_rows


def trained(adapter, tokens, rows):
    parameters = set_trainable(adapter, "all")
    if rows:
        parameters = train_rows(adapter, parameters, tokens)
    optimizer = torch.optim.Adam([parameter for _, parameter in parameters], lr=1e-2)
    for step in range(3):
        features = adapter.encode_text(tokens[step % 2 :])
        (features**3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters


@pytest.mark.parametrize(
    "make", [tiny_open_clip, lambda: tiny_open_clip(custom_text=True)], ids=["CLIP", "CustomTextCLIP"]
)
def test_training_the_rows_that_occur_changes_the_weights_as_training_the_table_does(make):
    model = make().double()
    whole, part = load_model(copy.deepcopy(model)), load_model(copy.deepcopy(model))
    tokens = whole.tokenize(CAPTIONS)
    trained(whole, tokens, rows=False)
    parameters = trained(part, tokens, rows=True)
    assert any(name.endswith("token_embedding.rows") for name, _ in parameters)
    assert max(parameter.numel() for _, parameter in parameters) < 49408
    unseen = whole.tokenize(["an unseen zebra"])
    torch.testing.assert_close(part.encode_text(unseen), whole.encode_text(unseen), rtol=1e-7, atol=1e-9)
    merge_rows(part)
    assert part.module.state_dict().keys() == model.state_dict().keys()
    for name, tensor in part.module.state_dict().items():
        torch.testing.assert_close(tensor, whole.module.state_dict()[name], rtol=1e-7, atol=1e-9, msg=name)
    table = next(name for name in model.state_dict() if name.endswith("token_embedding.weight"))
    untouched = torch.ones(49408, dtype=torch.bool)
    untouched[tokens.unique()] = False
    assert torch.equal(part.module.state_dict()[table][untouched], model.state_dict()[table][untouched])


def test_a_table_that_is_not_trained_or_shared_or_mostly_used_is_left_alone():
    tokens = torch.tensor([[49406, 320, 49407, 0]])
    frozen = load_model(tiny_open_clip())
    assert train_rows(frozen, set_trainable(frozen, "image"), tokens) == set_trainable(frozen, "image")
    tied = load_model(tiny_open_clip())
    tied.module.head = torch.nn.Linear(32, 49408, bias=False)
    tied.module.head.weight = tied.module.token_embedding.weight
    small, unknown = load_model(tiny_clip()), load_model(TwoTowers())
    for adapter, ids in ((tied, tokens), (small, torch.arange(8)), (unknown, torch.arange(8))):
        train_rows(adapter, set_trainable(adapter, "all"), ids)
        assert not any(isinstance(module, RowsOfEmbedding) for module in adapter.module.modules())
