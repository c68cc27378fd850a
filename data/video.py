"""Clips as FFmpeg reads them (through PyAV): the times of their frames, their frames, and parts of them.

Times are seconds from the first frame that is shown; frames are counted from it, in the order in which they are shown.
Only the first video stream counts: sound is neither read nor kept.
"""

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

_LATE = np.iinfo(np.int64).max


class VideoError(ValueError):
    """The bytes are not a clip that can be decoded, or it has no such part."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """When the N frames of a clip are shown, and where its stream may be parted without decoding it.

    Args:
        pts: (N + 1,) int64, when each frame is shown, in units of `time_base`, strictly rising; then the end.
        key: (N,) bool, whether decoding can begin at the frame: a key frame after which nothing is shown that belongs
            before it (a closed group of pictures).
        joint: (N + 1,) bool, whether the packets before and after this point hold just the frames before and after it.
            Everything up to a joint decodes without what follows. True at 0 and N.
        bytes: of all packets together.
        time_base: seconds.
    """

    pts: np.ndarray
    key: np.ndarray
    joint: np.ndarray
    bytes: int
    time_base: Fraction

    def __len__(self) -> int:
        return len(self.key)

    @property
    def seconds(self) -> np.ndarray:
        """(N + 1,) float64: when each frame is shown, then the end."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    def copyable(self, start: int, end: int) -> tuple[int, int] | None:
        """The longest part of frames [start, end) that can be cut out without decoding it, if there is one."""
        first = np.flatnonzero(self.key[start:end])
        if not len(first):
            return None
        begin = start + int(first[0])
        joints = np.flatnonzero(self.joint[begin + 1 : end + 1])
        return (begin, begin + 1 + int(joints[-1])) if len(joints) else None


@contextmanager
def open_video(data: bytes) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A clip's container and video stream, to be decoded in one thread.

    Raises:
        VideoError: also for whatever FFmpeg raises inside the `with`.
    """
    import av

    with (
        _errors(len(data)),
        av.open(io.BytesIO(data), mode="r", metadata_errors="replace") as container,
    ):
        if not container.streams.video:
            raise VideoError("no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        yield container, stream


@contextmanager
def _errors(size: int) -> Iterator[None]:
    """FFmpeg's errors about a clip of so many bytes, as VideoError."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot decode clip of {size} bytes: {error}") from error


def read_timeline(data: bytes) -> Timeline:
    """The times of a clip's frames, from its packets; nothing is decoded.

    Raises:
        VideoError: not a clip, or one without frames or with frames at no or equal times.
    """
    with open_clip(data) as clip:
        return clip.timeline


def _packets(container: "InputContainer", stream: "VideoStream") -> list["av.Packet"]:
    """A stream's packets, in the order in which they are decoded, without the empty one that flushes decoders."""
    return [packet for packet in container.demux(stream) if packet.size]


def _time(packet: "av.Packet") -> int | None:
    return packet.pts if packet.pts is not None else packet.dts


def _timeline(packets: list["av.Packet"], stream: "VideoStream") -> Timeline:
    if not packets:
        raise VideoError("no frames")
    times = [_time(packet) for packet in packets]
    if any(time is None for time in times):
        raise VideoError("frames without a time")
    decoded = np.array(times, dtype=np.int64)
    order = np.argsort(decoded, kind="stable")
    shown = decoded[order]
    steps = np.diff(shown)
    if len(steps) and steps.min() <= 0:
        raise VideoError("two frames at one time")
    assert stream.time_base is not None
    rate = stream.average_rate or stream.guessed_rate
    usual = int(np.median(steps)) if len(steps) else round(1 / (rate * stream.time_base)) if rate else 1
    last = packets[order[-1]].duration or usual
    # Point i of the decoding order parts the stream if all frames before it are shown before all after it.
    latest_before = np.maximum.accumulate(decoded)[:-1]
    earliest_after = np.minimum.accumulate(decoded[::-1])[::-1]
    parts = np.concatenate([[True], latest_before < earliest_after[1:], [True]])
    keys = np.array([packet.is_keyframe for packet in packets])
    # At such a point as many frames were shown as were decoded, so it is the same point of both orders.
    key = keys & parts[:-1] & (decoded == earliest_after)
    size = sum(packet.size for packet in packets)
    return Timeline(np.append(shown, shown[-1] + max(last, 1)), key, parts, size, stream.time_base)


class Clip:
    """A clip that is open, all its packets in memory, for one reader at a time.

    Attributes:
        timeline: of its frames.
    """

    def __init__(self, packets: list["av.Packet"], stream: "VideoStream", size: int) -> None:
        self.timeline = _timeline([packet for packet in packets if not packet.is_discard], stream)
        self._packets, self._stream, self._size = packets, stream, size
        self._decoded: Iterator[tuple[int, av.VideoFrame]] = iter(())
        self._coming: tuple[int, av.VideoFrame] | None = None  # decoded, but beyond what was asked for so far
        self._passed: int | None = None  # time of the frame before; None: there is nothing to go on with

    def frames(self, start: int, end: int) -> Iterator["av.VideoFrame"]:
        """Frames [start, end), in order. Decoding begins at the key frame before them, or goes on where the last call
        left it if that is nearer: parts in the order in which they are shown are decoded as one.

        Raises:
            VideoError: no such frames, or damage.
        """
        first, after = _bounds(self.timeline, start, end)
        self._go_to(start, first)
        while True:
            self._coming = self._coming or next(self._decoded, None)
            if self._coming is None or self._coming[0] >= after:
                return
            (self._passed, frame), self._coming = self._coming, None
            if self._passed >= first:
                yield frame

    def close(self) -> None:
        """Let go of decoded frames."""
        self._decoded, self._coming = iter(()), None

    def _go_to(self, start: int, first: int) -> None:
        """Be where frame `start`, which is shown at `first`, is still to come."""
        keys = np.flatnonzero(self.timeline.key[: start + 1])
        begin = int(self.timeline.pts[keys[-1]]) if len(keys) else None
        if self._passed is not None and self._passed < first:
            following = self.timeline.pts[np.searchsorted(self.timeline.pts, self._passed, side="right")]
            if begin is None or begin <= following:
                return
        # Not by seeking, which in some containers misses the key frame.
        skipped = next((i for i, packet in enumerate(self._packets) if _time(packet) == begin), 0)
        self._decoded, self._coming = self._decode(skipped), None

    def _decode(self, skipped: int) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """Frames and their times, from a packet on."""
        try:
            self._stream.codec_context.flush_buffers()
            for packet in [*self._packets[skipped:], None]:
                with _errors(self._size):
                    frames = self._stream.decode(packet)
                for frame in frames:
                    if frame.pts is None:
                        raise VideoError("frames without a time")
                    yield frame.pts, frame
        finally:
            self._passed = None


@contextmanager
def open_clip(data: bytes) -> Iterator[Clip]:
    """A clip, to be decoded.

    Raises:
        VideoError: not a clip; also for whatever FFmpeg raises inside the `with`.
    """
    with open_video(data) as (container, stream), closing(Clip(_packets(container, stream), stream, len(data))) as clip:
        yield clip


def _bounds(timeline: Timeline, start: int, end: int) -> tuple[int, int]:
    if not 0 <= start < end <= len(timeline):
        raise VideoError(f"frames {start} to {end} are not a part of a clip of {len(timeline)} frames")
    after = int(timeline.pts[end]) if end < len(timeline) else _LATE
    return int(timeline.pts[start]), after


def cut(data: bytes, start: int, end: int, reencode: bool, crf: int = 17) -> bytes:
    """Frames [start, end) of a clip as a clip of its own, without sound. The same input gives the same bytes.

    Args:
        data: the whole clip.
        start: first frame.
        end: first frame that is not wanted any more.
        reencode: H.264 in MP4, of exactly these frames at the same times; else packets are copied as they are, into the
            same kind of container: then frames can only be what `Timeline.copyable` gives for any frames.
        crf: quality of the encoder, 0 (lossless) to 51.

    Raises:
        VideoError: not a clip, no such frames, or they cannot be copied.
    """
    return _encode(data, start, end, crf) if reencode else _copy(data, start, end)


def _copy(data: bytes, start: int, end: int) -> bytes:
    import av

    target = io.BytesIO()
    with open_video(data) as (container, stream):
        # What precedes the start of a container's edit is decoded, but not shown.
        packets = [packet for packet in _packets(container, stream) if not packet.is_discard]
        timeline = _timeline(packets, stream)
        first, after = _bounds(timeline, start, end)
        if timeline.copyable(start, end) != (start, end):
            raise VideoError(f"frames {start} to {end} depend on others and cannot be cut out without decoding them")
        with av.open(target, "w", format=_container(container.format.name), options=_SAME_BYTES) as output:
            copy = output.add_stream_from_template(stream)
            for packet in packets:
                time = _time(packet)
                assert time is not None, "the timeline knows all times"
                if first <= time < after:
                    packet.stream = copy
                    packet.pts = time - first
                    if packet.dts is not None:
                        packet.dts -= first
                    output.mux(packet)
    return target.getvalue()


_SAME_BYTES = {"fflags": "bitexact"}  # else Matroska's muxer draws identifiers at random


def _container(name: str) -> str:
    """The muxer of a demuxer's format; the latter's name may list several formats."""
    names = name.split(",")
    return "mp4" if "mp4" in names else names[0]


def _encode(data: bytes, start: int, end: int, crf: int) -> bytes:
    import av

    target = io.BytesIO()
    with open_clip(data) as clip, av.open(target, "w", format="mp4", options=_SAME_BYTES) as output:
        encoder = None
        begin = 0
        for frame in clip.frames(start, end):
            assert frame.pts is not None, "frames are found by their times"
            if encoder is None:
                time_base = clip.timeline.time_base  # frames that decoders still held at the end come without one
                rate = 1 / (frame.duration * time_base) if frame.duration else Fraction(25)
                encoder = output.add_stream("libx264", rate=rate, options={"crf": str(crf), "threads": "1"})
                encoder.width, encoder.height = frame.width // 2 * 2, frame.height // 2 * 2  # 4:2:0 knows no odd sides
                encoder.pix_fmt = "yuv420p"
                encoder.codec_context.time_base = time_base
                begin = frame.pts
            clean = frame.reformat(encoder.width, encoder.height, "yuv420p")
            clean.pts, clean.time_base = frame.pts - begin, time_base
            clean.pict_type = av.video.frame.PictureType.NONE  # the source's key frames need not be ours
            output.mux(encoder.encode(clean))
        if encoder is None:
            raise VideoError(f"frames {start} to {end} could not be decoded")
        output.mux(encoder.encode(None))
    return target.getvalue()
