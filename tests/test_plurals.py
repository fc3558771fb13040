from __future__ import annotations

from cliperase_fast.plurals import counted, more_classes


def test_one_thing_is_singular_and_any_other_number_is_plural():
    assert [counted(number, "pair") for number in (0, 1, 2)] == ["0 pairs", "1 pair", "2 pairs"]
    assert counted(1234, "forget pair", ",") == "1,234 forget pairs"
    assert [more_classes(number) for number in (1, 1234)] == ["1 more class", "1,234 more classes"]
