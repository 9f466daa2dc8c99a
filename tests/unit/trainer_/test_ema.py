"""The average against its closed form; swapping; refusal of other parameters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.ema import Ema, swapped_values


@settings(max_examples=30, deadline=None)
@given(decay=st.sampled_from([0.0, 0.5, 0.9, 0.999]), steps=st.integers(0, 60), seed=st.integers(0, 1000))
def test_closed_form_with_warmup(decay, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    history = torch.randn(steps + 1, 3, generator=generator, dtype=torch.float64)
    live = nn.Parameter(history[0].float())
    ema = Ema({"w": live}, decay=decay)
    for values in history[1:]:
        live.data.copy_(values)
        ema.update()
    # average = sum over n of (1 - d_n) x_n prod_{m > n} d_m, with d_n = min(decay, (1 + n) / (10 + n)).
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(steps)]
    weights = torch.tensor([1.0, *[1 - d for d in decays]], dtype=torch.float64)
    for n, d in enumerate(decays):
        weights[: n + 1] *= d
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(ema.average["w"].double(), weights @ history, rtol=1e-5, atol=1e-6)
    assert ema.updates == steps


def test_average_is_float32_whatever_the_parameters():
    live = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"w": live}, decay=0.9)
    live.data.add_(2.0**-7)
    for _ in range(50):
        ema.update()
    assert ema.average["w"].dtype == torch.float32 and 1 < ema.average["w"][0] < 1 + 2.0**-7
    with ema.swapped_in():
        assert live.dtype == torch.bfloat16


def test_swap_gives_back_the_same_storage_also_after_an_error():
    live = nn.Parameter(torch.ones(3))
    ema = Ema({"w": live}, decay=0.9)
    live.data.fill_(5.0)
    place, kept = live.data_ptr(), live
    with ema.swapped_in():
        assert live.tolist() == [1, 1, 1] and live is kept
    assert live.tolist() == [5, 5, 5] and live.data_ptr() == place
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        raise RuntimeError("inside")
    assert live.tolist() == [5, 5, 5]
    assert ema.average["w"].tolist() == [1, 1, 1]
    with pytest.raises(KeyError), swapped_values({"a": live, "b": nn.Parameter(torch.zeros(1))}, {"a": torch.zeros(3)}):
        pass
    assert live.tolist() == [5, 5, 5]


def test_state_goes_round_and_other_parameters_are_refused():
    live = nn.Parameter(torch.randn(3))
    ema, other = Ema({"w": live}, decay=0.9), Ema({"w": nn.Parameter(torch.randn(3))}, decay=0.9)
    ema.update()
    place = other.average["w"].data_ptr()
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.average["w"], ema.average["w"]) and other.updates == 1
    assert other.average["w"].data_ptr() == place
    with pytest.raises(ValueError, match=r"holds other parameters \(e\.g\. \['v', 'w'\]\)"):
        Ema({"v": live}, decay=0.9).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="got EMA decay 1"):
        Ema({}, decay=1.0)
