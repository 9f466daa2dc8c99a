"""Shares of attention maps whose answer is known, and maps that captions of any length do not change."""

import pytest
import torch

from launch.study.maps import MapRecorder, MapSizes

F, HEIGHT, WIDTH = 4, 2, 3
PLACES = HEIGHT * WIDTH
N, SHARP = F * PLACES, 40.0
GRID = (F, HEIGHT, WIDTH)


def one_hot(values):
    return torch.nn.functional.one_hot(values, N).float()


def planted(kind):
    """q, k (1, 1, N, 2 N) whose softmax is known."""
    token = torch.arange(N)
    place, frame = one_hot(token % PLACES), one_hot(token // PLACES)
    scale = SHARP * (2 * N) ** 0.5
    keys = torch.cat([place, frame], dim=1)
    queries = {
        "uniform": torch.zeros(N, 2 * N),
        "diagonal": torch.cat([place, frame], dim=1) * scale,
        "stripes": torch.cat([place, -frame], dim=1) * scale,
        "frame": torch.cat([0 * place, frame], dim=1) * scale,
    }[kind]
    return queries[None, None], keys[None, None]


@pytest.mark.parametrize("side, fine", [(N, N), (8, N), (8, 8)])
@pytest.mark.parametrize(
    "kind, diagonal, stripes, own_frame",
    [("diagonal", 1, 0, 1), ("stripes", 0, 1, 0), ("frame", None, 0, 1), ("uniform", None, None, 1 / F)],
)
def test_shares_of_planted_maps(side, fine, kind, diagonal, stripes, own_frame):
    sizes = MapSizes(GRID, side, fine)
    cells = sizes.cells * sizes.finer
    assert sizes.cells == (PLACES if side == N else 2) and cells == (PLACES if fine == N else 2)
    found = MapRecorder(sizes, [0]).measured(*planted(kind), whole=False)
    if diagonal is None:  # spread over the cells of a frame, or of all
        diagonal = 1 / cells if kind == "frame" else 1 / (F * cells)
    if stripes is None:
        stripes = (F - 1) / (F * cells)
    got = [float(found[name]) for name in ("diagonal", "stripes", "own_frame", "text")]
    assert got == pytest.approx([diagonal, stripes, own_frame, 0], abs=1e-5)
    if kind == "uniform":
        assert torch.allclose(found["map"], torch.ones(1, F * sizes.cells, F * sizes.cells), atol=1e-5)
        assert torch.allclose(found["profile"], torch.ones(1, 2 * F - 1), atol=1e-5)


def test_text_changes_its_own_share_alone():
    """A text key that takes the same share of every query leaves what is among vision tokens as it is."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, N, 8).unbind(0)
    recorder = MapRecorder(MapSizes(GRID, N, N), [0, 2])
    alone = recorder.measured(q[:, [0, 2]], k[:, [0, 2]], whole=True)
    text_q, text_k = torch.randn(2, 1, 3, 5, 8).unbind(0)
    joint = [torch.cat(both, dim=2)[:, [0, 2]] for both in ((q, text_q), (k, text_k))]
    found = recorder.measured(*joint, whole=True)
    for name in ("map", "profile", "diagonal", "stripes", "own_frame"):
        assert torch.equal(found[name], alone[name])
    weights = torch.softmax(joint[0].double() @ joint[1].double().transpose(2, 3) / 8**0.5, dim=-1)[0]  # (2, N+5, N+5)
    assert torch.allclose(found["text"].double(), weights[:, :N, N:].sum(-1).mean(-1), atol=1e-6)
    assert int(found["text_tokens"]) == 5 and float(alone["text"].abs().max()) == 0
    # Of the whole map, text included: a dense pooling of the same weights, each token split over the cells it lies in.
    cut = torch.nn.functional.interpolate(torch.eye(N + 5)[None], size=(N + 5) * N, mode="nearest")[0]
    cut = cut.view(N + 5, N, N + 5).mean(-1).double()  # (tokens, cells)
    assert torch.allclose(found["whole"].double(), cut.T @ weights @ cut * (N + 5), atol=1e-4)


def test_frames_without_a_cell_are_refused():
    with pytest.raises(ValueError, match="got side 3 and fine 512 for videos of 4 latent frames, expected 4 <= side"):
        MapSizes(GRID, 3, 512).check()
