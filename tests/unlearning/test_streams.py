"""Retain pairs from webdataset shards that are read one after another."""

import operator
import random
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from stream_shards import forget_red, watched, weights, write_shard
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from cliperase_fast.data import open_source, streams
from cliperase_fast.data.intake import Tally
from cliperase_fast.data.streams import PairStream
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.unlearning import streaming


@pytest.fixture
def shards(tmp_path):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", range(15 * number, 15 * number + 15))
    return f"{tmp_path}/{{0..3}}.tar"


def stream(shards, **settings):
    source = open_source(f"stream:{shards}?head=20&buffer=8", seed=1, **settings)
    return source.stream, source.train


def names(pairs, count):
    return [pair.name for pair, _ in zip(pairs, range(count), strict=False)]


def test_a_pass_yields_every_pair_behind_the_head_once_and_each_pass_in_another_order(shards):
    behind, head = stream(shards)
    everything = {f"{number:04d}" for number in range(60)}
    held = {name.rpartition("/")[2] for name in head.ids}
    read = names(behind.pairs(), 80)
    assert len(head) == len(held) == 20
    assert set(read[:40]) == set(read[40:]) == everything - held
    assert read[:40] != read[40:] and read[:40] != sorted(read[:40])
    assert names(stream(shards)[0].pairs(), 80) == read
    other = replace(behind, seed=2)
    assert names(other.pairs(), 40) != read[:40] and other.fingerprint() != behind.fingerprint()
    assert replace(behind, buffer=9).fingerprint() != behind.fingerprint()


def test_seed_and_pass_draw_the_order_of_shards_and_that_within_the_buffer(shards):
    behind, _ = stream(shards)
    one = replace(behind, shards=behind.shards[:1], head=frozenset())
    orders = [
        tuple(dict.fromkeys(pair.shard for pair in part))
        for seed in range(6)
        for read in [list(islice(replace(behind, seed=seed, buffer=1).pairs(), 80))]
        for part in (read[:40], read[40:])
    ]
    assert len(set(orders[::2])) > 2 and sum(map(operator.ne, orders[::2], orders[1::2])) > 2
    found = [names(replace(one, seed=seed).pairs(), 30) for seed in range(2)]
    assert found[0][:15] != found[1][:15] and found[0][:15] != found[0][15:]


def test_the_buffer_holds_as_many_pairs_as_it_says_and_is_shuffled_at_the_end():
    read = []
    numbers = streams._shuffled((read.append(number) or number for number in range(50)), 8, random.Random(0))
    first = next(numbers)
    assert read == list(range(9)) and first < 8
    rest = list(numbers)
    assert sorted([first, *rest]) == list(range(50))
    assert list(streams._shuffled(iter(range(8)), 8, random.Random(0))) != list(range(8))
    late = [next(streams._shuffled(iter(range(9)), 8, random.Random(seed))) for seed in range(99)]
    assert set(late) == set(range(8))


def test_readers_share_a_pass_and_a_position_is_taken_up_again(shards):
    behind, _ = stream(shards)
    whole = set(names(behind.pairs(), 40))
    shares = [names(behind.pairs(reader, 2), 60) for reader in range(2)]
    assert set(shares[0]) | set(shares[1]) == whole
    assert names(behind.pairs(start=33), 20) == names(behind.pairs(), 53)[33:]


@pytest.mark.parametrize("readers", [2, 5])
def test_no_pair_is_read_twice_in_a_pass(shards, readers):
    found = []
    behind, _ = stream(shards)
    for reader in range(readers):
        pairs, own = behind.pairs(reader, readers), set()
        for pair in pairs:
            if pair.name in own:
                break  # the second pass
            own.add(pair.name)
        found += own
    assert len(found) >= 40 and set(found) == set(names(behind.pairs(), 40))


def test_commands_and_file_urls_are_opened_by_webdataset(shards, tmp_path):
    plain = names(stream(shards)[0].pairs(), 40)
    pipes = f"pipe:cat {tmp_path}/{{0..3}}.tar"
    assert names(stream(pipes)[0].pairs(), 40) == plain
    assert names(stream(f"file:{shards}")[0].pairs(), 40) == plain


def test_a_stream_that_breaks_off_is_an_error_that_names_the_place(shards, tmp_path):
    data = (tmp_path / "2.tar").read_bytes()
    for cut in (len(data) // 2 + 700, 512 * 6):  # inside a member, and where a header would begin
        (tmp_path / "2.tar").write_bytes(data[:cut])
        with pytest.raises(
            InputError, match=r"the shard .*2\.tar breaks off after \d+ pairs, in or behind the sample '00\d\d'"
        ):
            names(stream(shards)[0].pairs(), 60)
    with pytest.raises(InputError, match=r"pipe:cat .*missing cannot be opened \(the command ended with status 1\)"):
        stream(f"pipe:cat {tmp_path}/missing")
    behind, _ = stream(shards, on_error="skip")
    skipped = Tally()
    names(behind.pairs(skipped=skipped), 30)
    assert skipped.counts["shard that breaks off"] >= 1


def test_a_stream_without_enough_pairs_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="ends after 60 pairs, and its first 60 are held"):
        open_source(f"stream:{shards}?head=60")
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(InputError, match="ends after 0 pairs"):
        stream(f"{tmp_path}/empty.tar")
    with pytest.raises(InputError, match=r"after 0 pairs.*\(1 left out, the first: the shard .*missing\.tar"):
        open_source(f"stream:{tmp_path}/{{empty,missing}}.tar?head=10", on_error="skip")
    with pytest.raises(InputError, match="holds no usable pair"):
        next(PairStream("s", (f"{tmp_path}/empty.tar",), 0).pairs())
    with pytest.raises(InputError, match="only as retain"):
        forget_red(f"stream:{shards}", forget=f"stream:{shards}#caption:green")


def test_loader_processes_take_turns_and_a_position_among_them_is_taken_up_again(shards, monkeypatch):
    behind, _ = stream(shards)

    def read(start, count, workers=3):
        turns = []
        for worker in range(workers):
            info = SimpleNamespace(num_workers=workers, id=worker)
            monkeypatch.setattr(streaming, "get_worker_info", lambda info=info: info)
            pairs = streaming._Streamed(behind, lambda image: image.getpixel((0, 0)), None, start, 0, 1)
            turns.append([pair[:2] for pair in islice(pairs, count)])
        return [pair for turn in zip(*turns, strict=True) for pair in turn][:count]

    whole = read(0, 30)
    assert len({caption for _, caption in whole[:12]}) == 12
    for start in (3, 7, 8):
        assert read(start, 12) == whole[start : start + 12]


def test_a_run_on_a_stream_is_resumed_bit_for_bit(shards, tmp_path):
    source = f"stream:{shards}?head=20&buffer=8"
    whole = forget_red(source)
    assert whole.record["data"]["stream"] == {"pairs": 4 * 3, "head": 20, "shards": 4}
    output = {"output_dir": tmp_path / "run", "checkpoint_every": 1}
    broken = tmp_path / "1.tar"
    data = broken.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UnlearningError, match=r"before step 3: .*breaks off"):
        _break_at(patch, step=2)
        forget_red(source, **output)
    assert broken.read_bytes() == data
    resumed = forget_red(source, **output, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(whole), weights(forget_red(source, seed=5)))
    with pytest.raises(InputError, match=r"max_retain_pairs=10 does not limit .* less than the 20 that it holds"):
        forget_red(source, max_retain_pairs=10)


def test_loader_processes_read_the_shares_of_their_readers_from_any_position(shards):
    source = f"stream:{shards}?head=20&buffer=8"
    result, seen = watched(forget_red, source, num_workers=2)
    behind = open_source(source, seed=result.config.seed).stream
    readers = [behind.pairs(reader, 2) for reader in range(2)]
    expected = [next(readers[position % 2]).caption for position in range(18)]
    assert [caption for captions in seen for caption in captions] == expected[:12] and len(set(expected)) == 18
    pairs = streaming._Streamed(behind, ToTensor(), None, 7, 0, 1)
    loaded = DataLoader(pairs, batch_size=None, num_workers=2)
    assert [caption for _, caption, _ in islice(loaded, 11)] == expected[7:]


def _break_at(patch, step):
    """Let the stream fail once the batches of so many steps were read."""
    original = PairStream.pairs

    def pairs(self, *arguments):
        for number, pair in enumerate(original(self, *arguments)):
            if number == 3 * step:
                raise InputError("the shard 1.tar breaks off after 3 pairs")
            yield pair

    patch.setattr(PairStream, "pairs", pairs)


def test_unreadable_images_of_a_stream_are_replaced_by_the_next_and_counted(shards, tmp_path):
    bad = {number for number in range(60) if number % 15 % 3 == 0 and number % 15}
    for number in range(4):
        rows = range(15 * number, 15 * number + 15)
        write_shard(tmp_path / f"{number}.tar", rows, **{f"{row:04d}_png": b"no image" for row in bad})
    with pytest.raises((InputError, UnlearningError), match="in the shard"):
        forget_red(f"stream:{shards}?head=20&buffer=8")
    counts = []
    for workers in (0, 1):  # both read the same
        result, seen = watched(
            forget_red, f"stream:{shards}?head=20&buffer=8", on_error="skip", steps=6, num_workers=workers
        )
        counts.append(sum(row["count"] for row in result.record["data"]["skipped"].values()))
        assert not {int(caption.split()[-1]) for captions in seen for caption in captions} & bad
    head = open_source(f"stream:{shards}?head=20&buffer=8", seed=result.config.seed).train.ids
    assert counts[0] == counts[1] > len({int(name.rpartition("/")[2]) for name in head} & bad)
    behind, _ = stream(shards, on_error="skip")
    expected, missing = [], 0
    for pair in islice(behind.pairs(), 30):
        missing += 1
        if int(pair.name) not in bad:
            expected += [pair.caption] * missing
            missing = 0
    read = list(islice(streaming._Streamed(behind, ToTensor(), None, 0, 0, 1), len(expected)))
    assert [caption for _, caption, _ in read] == expected
    assert sum(len(skipped) for *_, skipped in read) == len(expected) - len(set(expected)) > 2
