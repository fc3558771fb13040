"""Streams from a server and from commands, and what is said when they break."""

import bz2
import gzip
import io
import lzma
import tarfile
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from stream_shards import forget_red, send, serving, weights, write_shard

from cliperase_fast.data import open_source
from cliperase_fast.data.intake import Intake, Tally
from cliperase_fast.data.streams import PairStream, read_shard
from cliperase_fast.errors import InputError, UnlearningError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Four shards of 15 pairs, as bytes by name."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(4):
        write_shard(folder / f"{number}.tar", range(15 * number, 15 * number + 15))
    return folder, {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def expected(shards):
    """The weights of a run on the files."""
    return weights(forget_red(f"stream:{shards[0]}/{{0..3}}.tar?head=20&buffer=8"))


def keys(shard, on_error="raise", timeout=60):
    return [pair.name for pair in read_shard(shard, Intake(on_error), timeout)]


def half(handler, data):
    send(handler, data, len(data) // 2)


def stall(handler, data):
    half(handler, data)
    handler.server.ended.wait(20)


def failing(handler, data):
    handler.send_error(404)


def flaky(shards, broken, how):
    """Answers of which the request with this number, from 1, is broken."""
    asked = []

    def answer(name):
        def respond(handler):
            asked.append(name)
            (how if len(asked) == broken else send)(handler, shards[name])

        return respond

    return {name: answer(name) for name in shards}, asked


def test_urls_and_commands_train_as_the_same_files_do(shards, expected):
    folder, data = shards
    with serving(data) as url:
        for source in (f"{url}/{{0..3}}.tar", f"pipe:curl -s -f {url}/{{0..3}}.tar", f"pipe:cat {folder}/{{0..3}}.tar"):
            assert torch.equal(weights(forget_red(f"stream:{source}?head=20&buffer=8")), expected)


@pytest.mark.parametrize(
    "how, timeout, said",
    [
        (failing, 60, r"cannot be opened \(curl ended with status 22: the server answered with an error, such as 404"),
        (
            half,
            60,
            r"breaks off after \d+ pairs, in or behind the sample '\d{4}' \(curl ended with status 18: the ser",
        ),
        (stall, 0.3, r"(breaks off|cannot be opened) .*\(curl sent nothing for 0.3 s; '\?timeout=' allows more\)"),
    ],
)
def test_a_server_that_fails_is_an_error_that_names_the_shard_and_the_sample(shards, how, timeout, said):
    answers, _ = flaky(shards[1], 1, how)
    with serving(answers) as url:
        with pytest.raises(InputError, match=rf"the shard {url}/2\.tar {said}"):
            keys(f"{url}/2.tar", timeout=timeout)
        assert len(keys(f"{url}/2.tar")) == 15  # the next time it does not


def test_a_broken_connection_stops_a_run_that_then_ends_as_a_whole_one_does(shards, expected, tmp_path):
    answers, asked = flaky(shards[1], 5, half)  # the head takes two shards
    with serving(answers) as url:
        source, output = f"stream:{url}/{{0..3}}.tar?head=20&buffer=8", {"output_dir": tmp_path, "checkpoint_every": 1}
        with pytest.raises(UnlearningError, match=r"before step [234]: the shard http\S+\.tar .*step-0000000[123]"):
            forget_red(source, **output)
        assert len(asked) == 5
        assert torch.equal(weights(forget_red(source, **output, resume=True)), expected)


def test_an_unreadable_image_late_in_a_shard_is_named_and_the_run_can_be_resumed(shards, expected, tmp_path):
    data = shards[1]
    source = f"stream:{tmp_path}/{{0..3}}.tar?head=20&buffer=8"
    output = {"output_dir": tmp_path / "run", "checkpoint_every": 1}
    for name in data:
        (tmp_path / name).write_bytes(data[name])
    behind = open_source(source).stream
    late = list(islice(behind.pairs(), 9))[8]
    number = int(late.name)
    first = number // 15 * 15
    write_shard(late.shard, range(first, first + 15), **{f"{number:04d}_png": b"not an image"})
    with pytest.raises(UnlearningError, match=rf"before step 3: the image {late.name} in the shard {late.shard} is"):
        forget_red(source, **output)
    (tmp_path / late.shard).write_bytes(data[f"{number // 15}.tar"])
    assert torch.equal(weights(forget_red(source, **output, resume=True)), expected)


def test_every_cut_of_a_shard_is_noticed_compressed_or_not(shards, tmp_path):
    data, path = shards[1]["0.tar"], tmp_path / "0.tar"
    for compress in (bytes, gzip.compress, bz2.compress, lzma.compress):
        whole = compress(data)
        path.write_bytes(whole)
        assert len(keys(str(path))) == 15
        content = len(whole) if compress is not bytes else len(data.rstrip(b"\0"))
        for cut in {1, 100, 512, *range(1024, content, content // 15 // 512 * 512 + 512), content - 1}:
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError, match=r"0\.tar (breaks off|cannot be opened)"):
                keys(str(path))


def test_a_damaged_header_is_noticed_anywhere_in_a_shard(shards, tmp_path):
    data, path = shards[1]["0.tar"], tmp_path / "0.tar"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        places = [(member.offset, member.name[:4]) for member in tar]
    for place, name in (places[1], places[14], places[-2], places[-1]):
        path.write_bytes(data[:place] + b"damaged!" + data[place + 8 :])
        with pytest.raises(InputError, match=r"0\.tar breaks off after \d+ pairs, in or .* \(unreadable header\)"):
            keys(str(path))
        kept = keys(str(path), "skip")
        assert kept == [f"{number:04d}" for number in range(len(kept))] and len(kept) in (int(name), int(name) - 1, 0)


def test_programs_that_are_missing_fail_or_never_end_are_named(shards, tmp_path, monkeypatch):
    folder, _ = shards
    with pytest.raises(InputError, match=r"cat \S+; exit 3 breaks off after 14 .* .the command ended with status 3"):
        keys(f"pipe:cat {folder}/0.tar; exit 3")
    with pytest.raises(InputError, match=r"sleep 20 cannot be opened \(the command sent nothing for 0.1 s"):
        keys("pipe:sleep 20", timeout=0.1)
    with pytest.raises(InputError, match=r"webdataset does not open 's3:' URLs .* use 'pipe:COMMAND'"):
        keys("s3://bucket/0.tar", "skip")
    with pytest.raises(InputError, match="the standard input"):
        keys("-")
    with pytest.raises(InputError, match=r"missing\.tar cannot be opened \(.*No such file"):
        keys(f"{tmp_path}/missing.tar")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1/0\.tar cannot be opened \(the program 'curl', which "):
        keys("http://127.0.0.1/0.tar")


def test_a_program_is_stopped_when_no_more_of_its_output_is_wanted(shards, recwarn):
    folder, _ = shards
    began = time.monotonic()
    pairs = read_shard(f"pipe:cat {folder}/0.tar; exec sleep 20", Intake())
    assert next(pairs).name == "0000"
    pairs.close()  # neither waits for the program nor complains of its status
    assert time.monotonic() - began < 15 and not recwarn.list


def test_empty_shards_are_passed_over_unless_all_are_empty(shards, tmp_path):
    folder, _ = shards
    write_shard(tmp_path / "empty.tar", [])
    names = tuple([f"{tmp_path}/empty.tar"] * 2 + [f"{folder}/{number}.tar" for number in range(2)])
    for readers in (1, 2, 4):
        for reader in range(readers):
            read = islice(PairStream("some", names, 0).pairs(reader, readers), 40)
            assert len({pair.name for pair in read}) >= 15
    few = tmp_path / "few.tar"
    write_shard(few, range(2))
    for reader in range(3):  # fewer pairs than readers
        assert {pair.name for pair in islice(PairStream("few", (str(few),), 0).pairs(reader, 3), 4)} == {"0000", "0001"}
    for readers in (1, 3):
        with pytest.raises(InputError, match="the stream none holds no usable pair"):
            next(PairStream("none", names[:2], 0).pairs(readers - 1, readers))


def test_a_stream_with_unreadable_images_only_behind_its_head_ends_in_an_error(shards, tmp_path):
    source = f"stream:{tmp_path}/{{0..3}}.tar?head=20&buffer=8"
    for name, data in shards[1].items():
        (tmp_path / name).write_bytes(data)
    held = {int(name.rpartition("/")[2]) for name in open_source(source).train.ids}
    for number in range(4):
        rows = range(15 * number, 15 * number + 15)
        bad = {f"{row:04d}_png": b"not an image" for row in rows if row not in held}
        write_shard(tmp_path / f"{number}.tar", rows, **bad)
    with pytest.raises(UnlearningError, match=r"step 1: 100 images in a row cannot be read in the stream .*the image"):
        forget_red(source, on_error="skip")


def test_what_is_skipped_in_a_broken_shard_is_counted(shards, tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(shards[1]["0.tar"][:-12000])
    skipped, behind = Tally(), PairStream("s", (str(path), f"{shards[0]}/1.tar"), 0, 4, "skip")
    assert len({pair.name for pair in islice(behind.pairs(skipped=skipped), 40)}) > 15
    assert skipped.counts["shard that breaks off"] >= 1
    assert skipped.take().counts and not len(skipped)


def test_parameters_of_a_url_are_not_taken_for_options(shards):
    _, data = shards
    with serving({f"0.tar?token={word}": data["0.tar"] for word in ("a", "b")}) as url:
        source = open_source(f"stream:{url}/0.tar?token=a?head=10")
        assert len(source.train) == 10 and source.stream.shards == (f"{url}/0.tar?token=a",)
        with pytest.raises(InputError, match="ends after 15 pairs"):
            open_source(f"stream:{url}/0.tar?token=b")
        with pytest.raises(InputError, match="unknown option 'haed'"):
            open_source(f"stream:{url}/0.tar?haed=10")


def test_the_time_limit_is_an_option_of_the_source(shards):
    source = open_source(f"stream:{shards[0]}/{{0..3}}.tar?head=20&timeout=7")
    assert source.stream.timeout == 7
    assert source.stream.fingerprint() == replace(source.stream, timeout=1).fingerprint()
