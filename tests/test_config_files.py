"""Config files of every kind: read as they were meant, or refused in one line."""

import json

import pytest

from cliperase_fast import InputError, UnlearnConfig

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.yaml", b"epochs: 3 # caf\xe9", "not UTF-8 text (byte 15); save it as UTF-8"),
        ("c.yaml", "epochs: 3".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("c.yaml", b"epochs: 3\nseed: 1\nepochs: 4", "sets 'epochs' twice: keep one"),
        ("c.json", b'{"epochs": 3, "epochs": 4}', "sets 'epochs' twice: keep one"),
        ("c.yaml", BOMB.encode(), "holds an alias (*name): write the value out"),
        ("c.yaml", b"a: &a [*a]", "holds an alias (*name)"),
        ("c.yaml", b"batch_size: 010", "holds 010, which YAML reads as 8: write the number that you mean"),
        ("c.yaml", b"method_options: {x: [-1:30.5]}", "holds -1:30.5, which YAML reads as -90.5"),
        ("c.yaml", b"[" * 10_000, "neither valid YAML nor JSON"),
        ("c.json", b"[" * 100_000, "neither valid YAML nor JSON"),
        ("c.json", b'{"epochs": ' + b"1" * 5000 + b"}", "neither valid YAML nor JSON"),
        ("c.yaml", b"epochs: 2024-99-99", "neither valid YAML nor JSON"),
        ("c.yaml", b"epochs: 2024-01-01", "must be a number"),
        ("c.yaml", b"epochs: [1, 2]", "must be a number"),
        ("c.yaml", b"epochs: .inf", "epochs=inf must be a whole number"),
        ("c.yaml", b"learning_rate: 1" + b"0" * 400, "must be a number"),
        ("c.yaml", b"? [a, b]\n: 1", "neither valid YAML nor JSON"),
        ("c.yaml", b"epochs: !!python/object/apply:os.getcwd []", "neither valid YAML nor JSON"),
        ("c.yaml", b"1: 2", "unknown setting 1"),
        ("c.yaml", b"epochs: !!int ''", "calls '' int, which it is not"),
        ("c.yaml", b"report: !!bool maybe", "calls 'maybe' bool, which it is not"),
        ("c.yaml", b"method: !!timestamp soon", "calls 'soon' timestamp, which it is not"),
        ("c.yaml", "trainable: last:\u00b2".encode(), "use all, image, text, last:K or lora"),
        ("c.yaml", b"- epochs", "must hold `name: value` lines, not a list"),
        ("c.yaml", b"epochs: \x00", "neither valid YAML nor JSON"),
    ],
)  # fmt: skip
def test_an_unreadable_config_file_is_an_error_of_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        UnlearnConfig.from_file(tmp_path / name)
    assert says in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_a_byte_order_mark_is_ignored(tmp_path):
    for name, text in (("c.yaml", "epochs: 3"), ("c.json", json.dumps({"epochs": 3}))):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert UnlearnConfig.from_file(tmp_path / name).epochs == 3


def test_nested_values_are_shortened_in_errors():
    value = ["x"]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(InputError, match=r"epochs=.{0,500} must be a number"):
        UnlearnConfig.from_dict({"epochs": value})
