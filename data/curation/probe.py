"""What a clip's container tells beyond the manifest: coding, data rate, key frames."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data.curation.base import Failure, Filter, Media
from data.video import VideoError, open_video, read_timeline


class Probe(Filter):
    """Of a clip's video stream, without decoding it (of the whole file, also where the sample is a part of it):

    codec            FFmpeg's name, as "h264"
    pixel_format     FFmpeg's name, as "yuv420p"
    bit_rate         bits per second, of the video stream alone
    counted_frames   frames there really are; the manifest's `frames` are what the container announces
    fps_spread       ratio of the longest to the median frame duration: above about 2, frames are missing or irregular
    key_frames       how many frames decoding can begin at
    key_interval     seconds from one of these to the next (or the end), at most: how exact cuts without encoding are
    rotation         degrees counterclockwise by which a player turns the frames
    sound            whether there is an audio stream
    """

    name = "probe"
    media: ClassVar = "video"
    columns = pa.schema(
        {
            "codec": pa.string(),
            "pixel_format": pa.string(),
            "bit_rate": pa.float64(),
            "counted_frames": pa.uint32(),
            "fps_spread": pa.float32(),
            "key_frames": pa.uint32(),
            "key_interval": pa.float32(),
            "rotation": pa.int16(),
            "sound": pa.bool_(),
        }
    )

    def settings(self) -> dict[str, Any]:
        return {}

    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        return [_probe(sample.data) for sample in samples]


def _probe(data: bytes) -> Mapping[str, Any] | Failure:
    try:
        timeline = read_timeline(data)
        with open_video(data) as (container, stream):
            first = next(container.decode(stream), None)
            codec = stream.codec_context
            told = {
                "codec": codec.name,
                "pixel_format": codec.pix_fmt,
                "sound": bool(container.streams.audio),
                "rotation": first.rotation if first is not None else None,
            }
    except VideoError as error:
        return Failure("undecodable clip", str(error))
    seconds = timeline.seconds
    durations = np.diff(seconds)
    keys = np.append(seconds[:-1][timeline.key], seconds[-1])
    return {
        **told,
        "bit_rate": 8 * timeline.bytes / seconds[-1],
        "counted_frames": len(timeline),
        "fps_spread": durations.max() / np.median(durations),
        "key_frames": int(timeline.key.sum()),
        "key_interval": np.diff(keys).max() if len(keys) > 1 else None,
    }
