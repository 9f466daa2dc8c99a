"""Masking by definition: whole models with stored float64 weights, one probe at a time."""

import numpy as np

from trainer.attention import dense as reference


def brute_force(module, probes, layers, ratio):
    """Per-probe change, energy, loss and realised ratio from stored float64 weights, the whole model each time."""
    thresholds, realised, rows = {}, [], []

    def dense(q, k, v, call):
        weights = reference.attention_weights(q, k)
        ordered = weights.flatten(2).sort(dim=-1).values
        at = reference.rank(ratio, ordered.shape[-1])
        thresholds[call.layer] = (ordered[..., at - 1] + ordered[..., at]) / 2
        return (weights @ v.double()).to(v.dtype)

    def masked(q, k, v, call):
        weights = reference.attention_weights(q, k)
        out, removed, _ = reference.masked_attention(weights, v, thresholds[call.layer])
        realised.append(removed.mean().item())
        return out.to(v.dtype)

    for prompt, stratum in np.ndindex(len(probes.samples), len(probes.sigmas)):
        probe = probes._collate([(prompt, stratum)])
        x = module.process.mix(probe.batch.latents, probe.noise, probe.sigma)
        target = module.process.target(probe.batch.latents, probe.noise, probe.sigma)
        with module.split_model.attention(dict.fromkeys(layers, dense)):
            base = module.velocity(x, probe.sigma, probe.batch)
        with module.split_model.attention(dict.fromkeys(layers, masked)):
            got = module.velocity(x, probe.sigma, probe.batch)
        squares = [(got - base), base, (got - target), (base - target)]
        rows.append([difference.double().square().mean().item() for difference in squares])
    change, energy, loss, dense_loss = np.array(rows).mean(axis=0)
    return change / energy, loss - dense_loss, dense_loss, np.mean(realised)
