"""Shards for the tests of the data plane, written by libraries that are not ours."""

import http.server
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

BLOCK = 512


def picture(width: int, height: int, form: str = "JPEG", seed: int = 0, mode: str = "RGB", **options) -> bytes:
    """An encoded picture of noise."""
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, form, **options)
    return file.getvalue()


def sample(index: int, prefix: str = "", width: int = 24, height: int = 16) -> dict:
    """A sample of webdataset's: a picture, a caption, some JSON."""
    return {
        "__key__": f"{prefix}{index:06d}",
        "jpg": picture(width + index % 5, height + index % 7, seed=index),
        "txt": f"caption {index}",
        "json": {"url": f"https://example.org/{index}", "similarity": index / 100, "index": index},
    }


def write_shard(path: Path, samples: list[dict]) -> Path:
    """A tar by webdataset's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for one in samples:
            writer.write(one)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **options) -> Path:
    """A tar of (name, payload) in the given order, by Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, **options) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def members_of(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of each file, as Python's tarfile reads it."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def as_json(value: Mapping) -> bytes:
    return json.dumps(value).encode()


class _RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, which the standard library's handler does not."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, RangeServer)
        server.requests.append((self.path, self.headers.get("Range")))
        if server.failures > 0:
            server.failures -= 1
            self.send_error(503)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(content[start : end + 1])

    def log_message(self, *_: object) -> None:
        pass


class RangeServer(http.server.ThreadingHTTPServer):
    """A web server over a folder that notes its GET requests and can be told to fail some."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), lambda *a: _RangeHandler(*a, directory=str(folder)))
        self.requests: list[tuple[str, str | None]] = []
        self.failures = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
