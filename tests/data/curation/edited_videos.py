"""Videos whose cuts are known: shots of many kinds, joined in many ways, with what is easily taken for a cut."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from drawn_clips import HEIGHT, WIDTH, encode, faded, moving, texture

SHOTS = ("still", "pan", "fast pan", "zoom", "objects", "grain", "shake", "turn")
JOINS = ("cut", "black", "white", "dissolve")
TRAPS = ("none", "flash", "long flash", "lights", "passer-by", "dark moment")


@dataclass
class Edited:
    """A video, the frames of its cuts by kind, and what it is made of."""

    data: bytes
    cuts: dict[str, list[int]] = field(default_factory=lambda: {"cut": [], "fade": [], "dissolve": []})
    made_of: str = ""


def shot(kind: str, count: int, random: np.random.Generator) -> list[np.ndarray]:
    """`count` frames of one shot."""
    picture = texture(int(random.integers(1 << 30)))
    direction = random.uniform(0, 2 * np.pi)
    if kind in ("pan", "fast pan"):
        speed = random.uniform(0.5, 2) if kind == "pan" else random.uniform(4, 8)
        return moving(picture, count, speed * np.cos(direction), speed * np.sin(direction))
    frames = [picture.copy() for _ in range(count)]
    if kind in ("zoom", "turn"):
        rate = random.choice([-1, 1]) * random.uniform(0.3, 1.0) / 100
        for i in range(count):
            angle, scale = (
                (0.0, 1.3 + abs(rate) * (i if rate > 0 else count - i)) if kind == "zoom" else (80 * rate * i, 1.5)
            )
            turned = cv2.getRotationMatrix2D((WIDTH / 2, HEIGHT / 2), angle, scale)
            frames[i] = cv2.warpAffine(picture, turned, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
    elif kind == "objects":
        for _ in range(4):
            colour = tuple(int(c) for c in random.integers(0, 256, 3))
            place, speed, radius = random.uniform(0, 120, 2), random.uniform(-3, 3, 2), int(random.integers(6, 18))
            for i in range(count):
                x, y = (place + speed * i) % (WIDTH, HEIGHT)
                cv2.circle(frames[i], (int(x), int(y)), radius, colour, -1)
    elif kind == "grain":
        for i in range(count):
            noisy = picture + random.normal(0, 10, picture.shape[:2])[:, :, None]
            frames[i] = np.clip(noisy, 0, 255).astype(np.uint8)
    elif kind == "shake":
        for i in range(count):
            frames[i] = np.roll(picture, random.integers(-4, 5, 2), (0, 1))
    return frames


def spoil(trap: str, frames: list[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
    """The shot with something sudden in it that is no cut."""
    at = int(random.integers(10, len(frames) - 12))
    if trap == "flash":
        frames[at] = faded([frames[at]], [0.15], 255)[0]
    elif trap == "long flash":
        frames[at : at + 3] = faded(frames[at : at + 3], [0.1, 0.1, 0.4], 255)
    elif trap == "lights":
        for i in range(at, len(frames)):
            brighter = frames[i].astype(np.float32) * (1 + 0.3 * min((i - at) / 10, 1))
            frames[i] = np.clip(brighter, 0, 255).astype(np.uint8)
    elif trap == "passer-by":
        for i in range(at, at + 10):
            left = int(-60 + (i - at) * 22)
            frames[i] = frames[i].copy()
            frames[i][:, max(left, 0) : max(left + 60, 0)] = (40, 30, 60)
    elif trap == "dark moment":
        frames[at : at + 2] = faded(frames[at : at + 2], [0.05, 0.05])
    return frames


def edited(seed: int, joins: tuple[str, ...] = JOINS, parts: int = 3, size: int = 1) -> Edited:
    """A video of several shots at 25 fps."""
    random = np.random.default_rng(seed)
    video = Edited(b"")
    frames: list[np.ndarray] = []
    names = []
    for part in range(parts):
        kind = SHOTS[(seed + 3 * part) % len(SHOTS)]
        trap = TRAPS[int(random.integers(len(TRAPS)))]
        following = spoil(trap, shot(kind, int(random.integers(45, 75)), random), random)
        join = joins[(seed + part) % len(joins)] if part else "start"
        names.append(f"{join}: {kind}, {trap}")
        if join == "cut":
            video.cuts["cut"].append(len(frames))
        elif join in ("black", "white"):
            colour = 0 if join == "black" else 255
            out, hold, back = int(random.integers(6, 16)), int(random.integers(1, 8)), int(random.integers(6, 16))
            frames[-out:] = faded(frames[-out:], np.linspace(1, 0, out + 1)[:-1], colour)
            video.cuts["fade"].append(len(frames) + hold // 2)
            frames += [np.full((HEIGHT, WIDTH, 3), colour, np.uint8)] * hold
            following[:back] = faded(following[:back], np.linspace(0, 1, back + 1)[1:], colour)
        elif join == "dissolve":
            length = int(random.integers(6, 20))
            shares = np.linspace(0, 1, length + 2)[1:-1]
            mixed = [
                np.clip(a * (1 - share) + b * share, 0, 255).astype(np.uint8)
                for a, b, share in zip(frames[-length:], following[:length], shares, strict=True)
            ]
            video.cuts["dissolve"].append(len(frames) - length + length // 2)
            frames[-length:] = mixed
            following = following[length:]
        frames += following
    if size != 1:
        frames = [cv2.resize(f, (WIDTH * size, HEIGHT * size), interpolation=cv2.INTER_CUBIC) for f in frames]
    video.data, video.made_of = encode(frames, g=50), "; ".join(names)
    return video


def matches(found: list[int], true: list[int], tolerance: int) -> set[int]:
    """Which of the true cuts are among those found, each of which stands for one."""
    left, matched = sorted(found), set()
    for cut in sorted(true):
        near = [f for f in left if abs(f - cut) <= tolerance]
        if near:
            left.remove(min(near, key=lambda f: abs(f - cut)))
            matched.add(cut)
    return matched
