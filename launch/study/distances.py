"""How far a video is from another: in pixels, in what is left after blurring, in colours.

Legend: T frames, H W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F

from launch.sample.generate import Pixels, psnr_and_ssim

#: Side, in pixels, of the squares whose means make the low-frequency picture: a latent cell of two patches.
COARSE = 16


def _pooled(video: Pixels) -> torch.Tensor:
    """Means over squares of `COARSE` pixels, (T, 3, H', W') between 0 and 1."""
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).double() / 255
    return F.avg_pool2d(pixels, min(COARSE, *pixels.shape[2:]))


def distances(video: Pixels, reference: Pixels) -> dict[str, float]:
    """Distances between two videos (T, H, W, 3) uint8 of one size.

    `psnr` in dB and `ssim` over all frames; `coarse`, the root mean square difference of means over squares of 16
    pixels (layout); `colour`, the largest absolute difference of a channel's mean or standard deviation over the whole
    video. Pixel values are between 0 and 1.
    """
    psnr, ssim = psnr_and_ssim(video, reference)
    coarse = float((_pooled(video) - _pooled(reference)).square().mean().sqrt())
    moments = [
        np.concatenate([pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))])
        for pixels in (video.astype(np.float64) / 255, reference.astype(np.float64) / 255)
    ]
    return {"psnr": psnr, "ssim": ssim, "coarse": coarse, "colour": float(np.abs(moments[0] - moments[1]).max())}
