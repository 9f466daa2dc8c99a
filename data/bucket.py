"""Buckets: the sizes that clips are brought to, so that every batch has one shape."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.families import DEFAULT_FAMILY, family_named


def check_size(frames: int, height: int, width: int, family: str = DEFAULT_FAMILY.name) -> None:
    """Checks that VAE and patches of a family divide a size.

    Raises:
        ValueError: if frames are not the family's step times k + 1, or a side is no multiple of 16.
    """
    faults, known = [], family_named(family)
    step, whose = known.frame_step, "" if known is DEFAULT_FAMILY else f" for {known.title}"
    if frames < 1 or (frames - 1) % step:
        below = max(1, frames - (frames - 1) % step)
        faults.append(f"got frames {frames}, expected {step} k + 1{whose}, for example {below} or {below + step}")
    for name, side in (("height", height), ("width", width)):
        if side < 16 or side % 16:
            below = max(16, side - side % 16)
            faults.append(f"got {name} {side}, expected a multiple of 16{whose}, for example {below} or {below + 16}")
    if faults:
        raise ValueError("; ".join(faults) + ".")


@dataclass(frozen=True, order=True)
class Bucket:
    """One size of clip.

    Args:
        frames: 6 k + 1 for Mochi, 4 k + 1 for Wan 2.1 and HunyuanVideo, 8 k + 1 for CogVideoX.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        family: name of the family of models that the clips are for.

    Raises:
        ValueError: for sizes that the family's VAE and patches do not divide.
    """

    frames: int
    height: int
    width: int
    family: str = DEFAULT_FAMILY.name

    def __post_init__(self) -> None:
        check_size(self.frames, self.height, self.width, self.family)

    @property
    def name(self) -> str:
        """For example `19x64x64`: frames, height, width."""
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str, family: str = DEFAULT_FAMILY.name) -> "Bucket":
        """A bucket from its name.

        Raises:
            ValueError: if the text is no name of a bucket of the family.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if match is None:
            raise ValueError(f"got bucket {text!r}, expected FRAMESxHEIGHTxWIDTH, for example 163x480x848.")
        frames, height, width = map(int, match.groups())
        return cls(frames, height, width, family)

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip's latent under the family's VAE: fewer frames, 8 times smaller sides."""
        stride = family_named(self.family).frame_stride
        return channels, (self.frames - 1) // stride + 1, self.height // 8, self.width // 8


def parse_buckets(names: Sequence[str], family: str = DEFAULT_FAMILY.name) -> list[Bucket]:
    """Buckets by name, each once, sorted.

    Raises:
        ValueError: if there is none, one is given twice, or a name is wrong.
    """
    buckets = [Bucket.parse(name, family) for name in names]
    if not buckets or len(set(buckets)) != len(buckets):
        raise ValueError(f"got buckets {list(names)}, expected one or more, each once, for example 163x480x848.")
    return sorted(buckets)


def choose_bucket(
    height: int, width: int, frames: int, buckets: Sequence[Bucket], *, upscale: bool = False
) -> Bucket | None:
    """The bucket that keeps most of a clip; None if it fits none.

    A bucket fits if the clip has its frames and, unless `upscale`, covers its height and width without being
    enlarged. Of those that fit, the one that crops least of the picture wins (shares within one part in twenty count
    as equal); then the one with most pixels and frames; then the smaller name.

    Args:
        height: of the clip, pixels.
        width: of the clip, pixels.
        frames: that the clip has at the rate it is read at.
        buckets: to choose from.
        upscale: take clips that have to be enlarged.
    """

    def share_kept(bucket: Bucket) -> float:
        """Share of the picture that is left when it is scaled to cover the bucket and cropped."""
        ratio = (width / height) / (bucket.width / bucket.height)
        return min(ratio, 1 / ratio)

    fits = [
        b for b in buckets if b.frames <= frames and (upscale or (b.height <= height and b.width <= width))
    ]  # fmt: skip
    return max(
        fits, key=lambda b: (round(20 * share_kept(b)), b.frames * b.height * b.width, -b.height), default=None
    )  # fmt: skip
