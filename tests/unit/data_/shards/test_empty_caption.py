"""Reading the encoded empty caption of latent shards: which folder's is taken, and what is refused."""

import pytest
import torch

from data.modules.latents import LatentDataModule
from tests.support.latent_shards import write_latents


def shards(folder, empty):
    pooled = torch.rand(3)  # other bytes in every folder: copies are not trained on and validated with
    return write_latents(folder, [("5x32x32", 20)], family="hunyuan_video", pooled=lambda i: pooled, empty=empty)


def caption(value=1.0, tokens=2, width=8, pooled=3):
    return {"text": torch.full((tokens, width), value), "pooled": torch.full((pooled,), -value)}


def test_of_several_folders_the_first_ones_is_taken_and_validation_needs_none(tmp_path):
    one, other = shards(tmp_path / "one", caption(1.0)), shards(tmp_path / "other", caption(2.0))
    bare = shards(tmp_path / "bare", None)
    for folders, value in (([one, other], 1.0), ([other, one], 2.0)):
        data = LatentDataModule(shards=folders, val_shards=bare, val_samples=2)
        data.check_empty_caption()
        found = data.empty_caption()
        assert found.text.tolist() == [[value] * 8] * 2 and found.pooled.tolist() == [-value] * 3
    with pytest.raises(
        ValueError, match=r"bare holds no encoded empty caption\. Run the `reblock encode` that made it"
    ):
        LatentDataModule(shards=[one, bare], val_samples=2).check_empty_caption()
    longer = shards(tmp_path / "longer", caption(tokens=4))
    with pytest.raises(ValueError, match=r"longer has 4 tokens, that of .*one 2; .*must agree"):
        LatentDataModule(shards=[one, longer], val_samples=2).check_empty_caption()


def test_half_precision_is_read_as_float32(tmp_path):
    half = {name: value.half() for name, value in caption(0.5).items()}
    found = LatentDataModule(shards=shards(tmp_path / "half", half), val_samples=2).empty_caption()
    assert found.text.dtype == found.pooled.dtype == torch.float32 and float(found.text[0, 0]) == 0.5


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ({"width": 9}, r"holds .*\(2, 9\).*expected .*\(2, 8\)"),
        ({"tokens": 0}, r"holds .*\(0, 8\).*expected .*\(1, 8\)"),
        ({"pooled": 4}, r"holds .*\(4,\).*expected .*\(3,\)"),
        ({"value": float("nan")}, "numbers that are not finite"),
    ],
)
def test_a_caption_that_the_model_cannot_take_is_refused(spoilt, said, tmp_path):
    data = LatentDataModule(shards=shards(tmp_path / "spoilt", caption(**spoilt)), val_samples=2)
    with pytest.raises(ValueError, match=said):
        data.check_empty_caption()


def test_a_missing_pooled_embedding_is_refused(tmp_path):
    data = LatentDataModule(shards=shards(tmp_path / "text", {"text": torch.ones(2, 8)}), val_samples=2)
    with pytest.raises(ValueError, match=r"expected .*pooled"):
        data.check_empty_caption()
