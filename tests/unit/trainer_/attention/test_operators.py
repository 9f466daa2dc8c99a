"""The engine's operators: their schemas and fake implementations, and a compiled whole model that holds one."""

import pytest
import torch

from trainer.attention import masked_attention, operators, pooled_quantiles
from trainer.models.captions import Captions
from trainer.models.mochi import SplitMochi


def heads(dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, 11, 8, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "dense"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([11, 4])])
def test_fakes_are_as_what_they_stand_for(dtype, backend, lengths):
    q, k, v = heads(dtype)
    with_lengths = {"lengths": lengths, "backend": backend}
    limits = pooled_quantiles(q, k, [0.5])[..., 0]
    for operator, given, named in [
        (operators.row_statistics, (q, k), {}),
        (operators.key_statistics, (q, k, [0.3, 0.01]), {}),
        (operators.key_statistics, (q, k, []), {}),
        (operators.pooled_quantiles, (q, k, [0.1, 0.9]), {"num_keys": 7}),
        (operators.masked_attention, (q, k, v, limits), {"renormalise": False}),
        (operators.masked_attention, (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), limits), {"tail": "mean"}),
    ]:
        found = torch.library.opcheck(operator, given, {**with_lengths, **named})
        assert set(found.values()) == {"SUCCESS"}


def test_a_compiled_model_holds_masked_attention_in_one_graph(make_transformer, make_batch):
    """Each block's attention is the operator: no graph break, and the velocity of the functions themselves."""
    split_model, batch = SplitMochi(make_transformer(2)), make_batch((3, 3))
    time = torch.linspace(200.0, 800.0, len(batch))

    def attention(mask, quantiles):
        def attend(q, k, v, call):
            return mask(q, k, v, quantiles(q, k, [0.6])[..., 0])[0]

        return attend

    def velocity(latents):
        return split_model(latents, time, Captions.of(batch))

    with torch.no_grad():
        dense = velocity(batch.latents)
        with split_model.attention(dict.fromkeys(range(2), attention(masked_attention, pooled_quantiles))):
            expected = velocity(batch.latents)
        with split_model.attention(
            dict.fromkeys(range(2), attention(operators.masked_attention, operators.pooled_quantiles))
        ):
            graphs = []

            def keeping(graph, inputs):
                graphs.append(graph)
                return graph.forward

            got = torch.compile(velocity, backend=keeping, fullgraph=True)(batch.latents)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1 and sum("reblock" in name and "masked_attention" in name for name in called) == 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, dense, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_training_may_hold_them_and_has_the_gradients_of_before(compiled):
    inputs = [t.requires_grad_() for t in heads()]

    def attention(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q * 2, k, v)

    def observed(q, k, v):
        seen = [*operators.row_statistics(q * 2, k), *operators.key_statistics(q * 2, k, [0.3])]
        seen.append(operators.pooled_quantiles(q * 2, k, [0.5]))
        return attention(q, k, v), *seen, *operators.masked_attention(q * 2, k, v, seen[-1][..., 0])

    expected = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    run = torch.compile(observed, backend="aot_eager", fullgraph=True) if compiled else observed
    out, *seen = run(*inputs)
    assert len(seen) == 9 and not any(t.requires_grad for t in seen)
    for got, want in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_what_is_refused_is_refused_by_an_operator_too():
    q, k, v = heads()
    with pytest.raises(ValueError, match="got tail 'median'"):
        operators.masked_attention(q, k, v, torch.zeros(2, 3), tail="median")
    with pytest.raises(ValueError, match="got backend 'fast'"):
        operators.row_statistics(q, k, backend="fast")
