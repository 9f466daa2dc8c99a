"""The noise of a CogVideoX is that of its base's scheduler, or of the published models where the base has none."""

import json
import re

import pytest
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from tests.support.tiny_families import make
from trainer.module import RetrainBlocks, SurgeryConfig

SIZES = {"cogvideox-2b": 3.0, "cogvideox-5b": 1.0}
OPTIONS = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def signal(base):
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=1))
    module.check()
    module.build("cpu")
    return module.process.signal


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("name", SIZES)
def test_the_shift_is_read_from_the_bases_scheduler(name, kind, tmp_path):
    make(name).save_pretrained(tmp_path / "transformer")
    without = [signal(place) for place in (tmp_path, tmp_path / "transformer", tmp_path / "transformer/config.json")]
    assert without == [CogVideoXDDIMScheduler(snr_shift_scale=SIZES[name], **OPTIONS).alphas_cumprod.tolist()] * 3
    for shift in (1.0, 2.0, 3.0):
        scheduler = kind(snr_shift_scale=shift, **OPTIONS)
        scheduler.save_pretrained(tmp_path / "scheduler")
        assert signal(tmp_path) == scheduler.alphas_cumprod.tolist()
        assert signal(tmp_path / "transformer") == without[0]
    path = tmp_path / "scheduler" / "scheduler_config.json"
    left_out = {key: value for key, value in json.loads(path.read_text()).items() if key != "snr_shift_scale"}
    path.write_text(json.dumps(left_out))
    assert signal(tmp_path) == CogVideoXDDIMScheduler(**OPTIONS).alphas_cumprod.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"prediction_type": "epsilon"},
            "prediction_type 'epsilon', expected 'v_prediction' in the scheduler's config",
        ),
        ({"rescale_betas_zero_snr": False}, "rescale_betas_zero_snr False, expected True"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500, expected 1000"),
        ({"beta_end": 0.02}, "beta_end 0.02, expected 0.012"),
        ({"snr_shift_scale": 0}, "snr_shift_scale 0, expected a number above 0"),
    ],
)
def test_a_scheduler_of_other_noise_is_refused_before_anything_is_loaded(change, said, tmp_path):
    make("cogvideox-5b").save_pretrained(tmp_path / "transformer")
    CogVideoXDDIMScheduler(**OPTIONS).save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    module = RetrainBlocks(base=str(tmp_path), surgery=SurgeryConfig(last=1))
    with pytest.raises(ValueError, match=rf"got {re.escape(said)}.*CogVideoX"):
        module.check()
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is a list, expected an object"):
        module.check()
