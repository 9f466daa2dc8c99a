"""The probe set: complete, fixed, one caption length per batch, spread evenly over ranks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from data.batch import Sample
from trainer.callbacks.probe_set import ProbeSet, ProbeSource, refuse_key_mask
from trainer.models.layout import AttentionCall, TokenLayout

SIGMAS = (0.25, 0.75)


def draw_samples(lengths, uids=None):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randn(4, 2, 4, 6, generator=generator), torch.randn(n, 16, generator=generator), f"clip-{i}", uid)
        for i, (n, uid) in enumerate(zip(lengths, uids or range(len(lengths)), strict=True))
    ]


def probe_set(lengths=(3, 0, 5, 3, 3), **kwargs):
    return ProbeSet(draw_samples(lengths), SIGMAS, **{"seed": 1, "batch_size": 4} | kwargs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_probe_counts_once_and_ranks_have_equal_work(world_size):
    probes = probe_set()
    counted, turns = [], set()
    for rank in range(world_size):
        shared = list(probes.share(rank, world_size))
        turns.add(len(shared))
        counted += [
            pair for batch, counts in shared if counts for pair in zip(batch.prompts, batch.strata, strict=True)
        ]
    assert sorted(counted) == [(p, s) for p in range(5) for s in range(2)]
    assert len(turns) == 1


def test_captions_of_a_batch_have_one_length_and_batches_stay_small():
    for batch, _ in probe_set().share(0, 1):
        assert len(set(batch.batch.text_lengths)) == 1
        assert len(batch.batch) == len(batch.prompts) <= 4
        assert batch.sigma.tolist() == [SIGMAS[s] for s in batch.strata]


def test_a_probe_is_the_same_whatever_the_batch_or_rank():
    def tensors(probes, world_size):
        found = {}
        for rank in range(world_size):
            for batch, _ in probes.share(rank, world_size):
                for row, pair in enumerate(zip(batch.prompts, batch.strata, strict=True)):
                    found[pair] = (batch.noise[row], batch.batch.latents[row], batch.sigma[row])
        return found

    one, other = tensors(probe_set(), 1), tensors(probe_set(batch_size=1), 3)
    assert one.keys() == other.keys()
    assert all(torch.equal(a, b) for pair in one for a, b in zip(one[pair], other[pair], strict=True))


def test_noise_follows_uid_and_seed():
    def noise(uids, seed):
        probes = ProbeSet(draw_samples((3, 3), uids), (0.5,), seed=seed)
        return next(probes.share(0, 1))[0].noise

    one = noise((4, 9), 1)
    assert torch.equal(one.flip(0), noise((9, 4), 1))
    assert not torch.equal(one, noise((4, 9), 2))


def test_a_batchs_identity_changes_with_every_tensor_of_it():
    def identities(**kwargs):
        return {batch.identity for batch, _ in probe_set(**kwargs).share(0, 1)}

    own = identities()
    assert own == identities() and len(own) == len(probe_set().groups())
    for other in ({"seed": 2}, {"batch_size": 1}):
        assert not own & identities(**other), other
    one, two = (ProbeSet(draw_samples((3, 3)), sigmas, seed=1) for sigmas in ((0.25, 0.75), (0.75, 0.25)))
    assert next(one.share(0, 1))[0].identity != next(two.share(0, 1))[0].identity


def test_samples_of_one_caption_share_a_number_and_empty_captions_do_not():
    samples = draw_samples((3, 0, 3, 0, 3))
    samples[4] = replace(samples[4], text=samples[0].text.clone())
    assert ProbeSet(samples, SIGMAS, seed=1).caption_ids == [0, 1, 2, 3, 0]


def test_captions_can_be_left_out_and_nothing_else_changes():
    samples = draw_samples((3, 0, 3))
    samples[2] = replace(samples[2], text=samples[0].text.clone())
    with_captions, without = (
        ProbeSet(samples, SIGMAS, seed=1, batch_size=1, unconditional=dropped) for dropped in (False, True)
    )
    assert without.text_tokens == [0, 0, 0] and without.caption_ids == with_captions.caption_ids == [0, 1, 0]
    assert without.keys == with_captions.keys and [len(s.text) for s in samples] == [3, 0, 3]

    def batches(probes):
        return {(b.prompts, b.strata): b for b, _ in probes.share(0, 1)}

    dropped, kept = batches(without), batches(with_captions)
    assert dropped.keys() == kept.keys()
    for pair, batch in dropped.items():
        assert not batch.batch.text.any() and not batch.batch.text_mask.any() and batch.batch.text_lengths == (0,)
        assert torch.equal(batch.noise, kept[pair].noise) and torch.equal(batch.batch.latents, kept[pair].batch.latents)
        assert (batch.identity == kept[pair].identity) == (pair[0] == (1,))  # without a caption there is none to drop
    # All captions have one length, none: batches are full.
    assert len(ProbeSet(samples, SIGMAS, seed=1, batch_size=6, unconditional=True).groups()) == 1


def test_large_latents_are_measured_one_by_one():
    large = Sample(torch.zeros(12, 7, 60, 106), torch.zeros(1, 4), "large", 0)
    assert ProbeSet([large], SIGMAS, seed=0).batch_size == 1


def test_faults_are_named():
    with pytest.raises(ValueError, match="got no probe samples"):
        ProbeSet([], SIGMAS, seed=0)
    mask = torch.tensor([[True, True], [True, False]])
    refuse_key_mask(AttentionCall(0, TokenLayout.of((1, 1, 4), (2, 2), mask)))
    with pytest.raises(ValueError, match="one length"):
        refuse_key_mask(AttentionCall(0, TokenLayout.of((1, 1, 4), (2, 1), mask)))


def test_the_reference_job_measures_both_on_the_same_probes():
    recipe = yaml.safe_load((Path(__file__).resolve().parents[4] / "recipes" / "mochi_last4.yaml").read_text())
    sinks, masking = (
        next(c["init_args"] for c in recipe["trainer"]["callbacks"] if c["class_path"].endswith(name))
        for name in ("SinkFrequency", "MaskingRobustness")
    )
    assert sinks["prompts"] == 14 and sinks["sigmas"] == sorted(set(sinks["sigmas"]))
    # Half of Mochi's sampling steps lie above 0.975.
    assert len(sinks["sigmas"]) == 8 and sum(sigma > 0.975 for sigma in sinks["sigmas"]) == 2
    assert masking == sinks | {"scopes": ["retrained", "each"]}


def test_a_source_is_known_by_its_method():
    class Source:
        def probe_samples(self, count):
            return draw_samples((1,))

    assert isinstance(Source(), ProbeSource) and not isinstance(object(), ProbeSource)
