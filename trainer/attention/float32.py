"""Matrix products that neither autocast nor TF32 rounds."""

import torch
from torch import Tensor


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b (..., n, m) in true float32, whatever autocast and the process-wide matmul precision are."""
    before = torch.get_float32_matmul_precision()
    if before == "highest" and not torch.is_autocast_enabled(a.device.type):
        return a.float() @ b.float()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float()
    finally:
        torch.set_float32_matmul_precision(before)
