"""Small webdataset shards, and a server that has them, for the tests of streams."""

import io
import tarfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image

import cliperase_fast as cf
from cliperase_fast.unlearning.streaming import StreamLoader

COLOURS = {"green": (30, 200, 30), "blue": (30, 30, 200)}


def png(number, colour):
    pixels = np.random.default_rng(number).integers(0, 40, (8, 8, 3)) + np.array(COLOURS[colour])
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path, numbers, **changed):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            colour = list(COLOURS)[number % 2]
            members = {
                f"{number:04d}.png": png(number, colour),
                f"{number:04d}.txt": f"a {colour} square {number}".encode(),
            }
            for name, data in members.items():
                data = changed.get(name.replace(".", "_"), data)
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def reds(count=30):
    rows = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 40, (8, 8, 3)) + np.array((200, 30, 30))
        rows.append((Image.fromarray(pixels.astype(np.uint8)), f"a red square {number}"))
    return rows


def forget_red(retain, forget=None, **settings):
    quick = {**tiny.QUICK, "transform": open_clip.image_transform(8, is_train=False), "steps": 4, "epochs": "auto"}
    return cf.unlearn(tiny.make_tiny_clip(), forget or reds(), retain, **{**quick, **settings})


def watched(run, *arguments, **settings):
    """Return what `run` returns, and the captions of the stream in each of its batches."""
    seen = []
    original = StreamLoader._joint

    def joint(self, number, forget_pixels, pixels, captions):
        seen.append(captions)
        return original(self, number, forget_pixels, pixels, captions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamLoader, "_joint", joint)
        return run(*arguments, **settings), seen


def weights(result):
    return torch.cat([tensor.flatten().double() for tensor in result.model.state_dict().values()])


@contextmanager
def serving(answers):
    """Serve {path: function that gets the handler, or bytes} on a local port; yields the URL."""
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.lstrip("/"))
            if answer is None:
                self.send_error(404)
            elif callable(answer):
                answer(self)
            else:
                send(self, answer)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ended, server.daemon_threads = ended, True
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler, data, part=None):
    """Announce all bytes, and send the first `part` of them."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:part])
