"""Our loader against the webdataset library's stock PIL pipeline on the same tars: photographs to square crops.

Three contestants take turns on 8 x 250 JPEGs of about 500 px, with the same workers, batch and output (uint8, 256 px):

- `millrace`: plan, byte-range reads, our decoder and transforms;
- `webdataset`: sequential tars, PIL decode, PIL bicubic resize and random crop, as in its documentation;
- `webdataset_our_decoder`: the same, with our decoder and transforms in the place of PIL.

webdataset reads in sequence and without a shuffle buffer, which is its fastest way.
"""

import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.buckets import Square
from data.decode import decode_image
from data.tars import Source, TarData, TarSplit
from data.transforms import Framing, frame


def run(
    shards: int = 8,
    per_shard: int = 250,
    size: int = 256,
    batch: int = 50,
    workers: Sequence[int] = (0, 2),
    repeats: int = 5,
    clock: Literal["wall", "process"] = "wall",
    folder: str | None = None,
) -> dict:
    """Samples per second of the three contestants, one pass over the tars each, in turn, median of `repeats`.

    Args:
        clock: "process" counts the CPU time of this process and its workers instead of the time that passes: for a
            machine that others use. It is then the rate of one core.
        folder: where the tars are, or are written if there are none; a temporary folder by default.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder or temporary)
        urls = sorted(str(p) for p in root.glob("*.tar"))
        if not urls:
            urls = write_photos(root, shards, per_shard)
        # Indexing and selecting are done once for many runs. Two batches per worker are read ahead, as in webdataset.
        cache = str(Path(temporary) / "cache")
        data = TarData({"photos": Source(urls)}, prefetch=2 * max(workers) or 1, cache_folder=cache)
        split = data.open(Square(size))
        samples = len(split.selections["photos"])
        if samples % batch:
            raise ValueError(f"{samples} samples are no whole number of batches of {batch}")
        results = {}
        for count in workers:
            contestants: dict[str, Callable[[], Iterator[int]]] = {
                "millrace": partial(_millrace, split, batch, count, samples),
                "webdataset": partial(_webdataset, urls, size, batch, count, _with_pil),
                "webdataset_our_decoder": partial(_webdataset, urls, size, batch, count, _with_ours),
            }
            rates: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(repeats):
                for name, contestant in contestants.items():
                    rates[name].append(_rate(contestant(), samples, clock))
            results[f"workers_{count}"] = {
                "samples_per_s": {name: statistics.median(values) for name, values in rates.items()},
                "ratio_to_webdataset": _median_ratio(rates["millrace"], rates["webdataset"]),
                "ratio_to_webdataset_with_our_decoder": _median_ratio(
                    rates["millrace"], rates["webdataset_our_decoder"]
                ),
                "all_samples_per_s": rates,
            }
        sizes = [path.stat().st_size for path in map(Path, urls)]
        return {
            "samples": samples,
            "bytes_per_sample": sum(sizes) / samples,
            "crop": size,
            "batch": batch,
            "clock": clock,
            **results,
        }


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Of neighbouring runs, so that a machine that is busy for a while slows both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _rate(batches: Iterator[int], expected: int, clock: str) -> float:
    start = _now(clock)
    served = sum(batches)  # until the workers have ended
    seconds = _now(clock) - start
    assert served == expected, f"{served} samples served instead of {expected}"
    return served / seconds


def _millrace(split: TarSplit, batch: int, workers: int, samples: int) -> Iterator[int]:
    plan = split.plan(lanes=1, slice_size=batch, seed=0)
    loader = split.loader(plan, range(1), workers=workers)
    try:
        for step in range(samples // batch):
            yield sum(len(part) for part in loader.step(step))
    finally:
        loader.close()


def _now(clock: str) -> float:
    if clock == "wall":
        return time.perf_counter()
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _webdataset(urls: list[str], size: int, batch: int, workers: int, decode: Callable) -> Iterator[int]:
    import webdataset

    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False)
        .to_tuple("jpg", "txt")
        .map_tuple(lambda image: decode(image, size), bytes.decode)
        .batched(batch)
    )
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        assert images.shape[1:] == (3, size, size) and images.dtype == torch.uint8
        yield len(images)


def _with_pil(data: bytes, size: int) -> Tensor:
    with Image.open(io.BytesIO(data)) as encoded:
        image = encoded.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = random.randint(0, width - size), random.randint(0, height - size)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _with_ours(data: bytes, size: int) -> Tensor:
    out = torch.empty((3, size, size), dtype=torch.uint8)
    pixels = decode_image(data, cover=(size, size)).pixels
    frame(pixels, (size, size), Framing(random.random(), random.random(), False), out)
    return out


def write_photos(folder: Path, shards: int, per_shard: int, seed: int = 0) -> list[str]:
    """Tars of JPEGs with the statistics of photographs (spectrum near 1/f, correlated channels), about 60 KB each.

    Returns the tars' paths.
    """
    from webdataset import TarWriter

    rng = np.random.default_rng(seed)
    scenes = [_photo(rng, *((375, 500) if i % 2 else (500, 400))) for i in range(40)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{shard:05d}.tar") for shard in range(shards)]
    for shard, path in enumerate(paths):
        with TarWriter(path) as writer:
            for i in range(per_shard):
                scene = scenes[int(rng.integers(len(scenes)))]
                moved = np.roll(scene, tuple(rng.integers(0, scene.shape[:2])), axis=(0, 1))
                encoded = io.BytesIO()
                Image.fromarray(moved).save(encoded, "JPEG", quality=85)
                key = f"{shard:05d}{i:05d}"
                writer.write({"__key__": key, "jpg": encoded.getvalue(), "txt": f"photograph {key}"})
    return paths


def _photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    noise = rng.standard_normal((3, 2, height, width // 2 + 1))
    light, red, blue = np.fft.irfft2((noise[:, 0] + 1j * noise[:, 1]) / frequency**1.3, s=(height, width))
    image = np.stack([light + 0.3 * red, light - 0.1 * red + 0.1 * blue, light - 0.3 * blue], axis=-1)
    image = (image - image.mean()) / image.std() * 50 + 128 + rng.normal(0, 3, (height, width, 1))
    return image.clip(0, 255).astype(np.uint8)
