"""`reblock bench attention`: what the attention engine costs beside one dense forward, and how exact it is.

The divisor is `F.scaled_dot_product_attention` of the same q, k and v, on CUDA in the fastest of its back ends. Rounds
go through the dense forward and every operation in turn, and ratios are taken within a round, so that a busy machine
slows all of them alike. Results are compared with weights in float64, a slice of queries at a time, so at any N: of all
heads where that is cheap, else of one. Each row is written to standard error as soon as it is known.

Legend: N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

import ctypes
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from launch.bench.command import Options, Result, host_peak
from trainer.attention import EPS, layer_statistics, masked_attention, pooled_quantiles
from trainer.attention import dense as reference
from trainer.attention.api import choose_backend

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))
MEDIAN = RATIOS.index(0.5)

#: By device: lengths, heads, number format, back ends.
TOKENS = {"cpu": (2048, 4096, 8192), "cuda": (11_130, 23_850, 44_776)}
HEADS = {"cpu": 4, "cuda": 24}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
BACKENDS = {"cpu": ("chunked", "dense"), "cuda": ("triton", "chunked")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Up to so many tokens the dense back end runs and every head is compared with float64; above, one head is.
_REFERENCE = 2048
#: Seconds after which no further round of a back end and length is begun.
_SECONDS = {"cpu": 120.0, "cuda": 10.0}
#: Weights of a slice of the float64 comparison: 32 MiB on a CPU, 256 MiB on CUDA.
_SLICE = {"cpu": 2**22, "cuda": 2**25}
#: Between these lie the standard deviations of the heads' logits, evenly spaced: the first head is the flattest.
_SPREAD = (1.0, 5.0)
#: Tokens with which a fresh process sets up libraries and threads before its memory is read.
_WARM = 64
#: Of glibc's mallopt: its key for the size from which a buffer is mapped and, once freed, given back; and that size.
_MMAP_THRESHOLD = (-3, 2**20)
#: How PyTorch itself chooses among its dense kernels: the divisor on a CPU.
CHOSEN = "default"


@dataclass(frozen=True)
class Inputs:
    """q, k, v (1, h, N, d), and the thresholds (1, h) of the masking."""

    q: Tensor
    k: Tensor
    v: Tensor
    thresholds: Tensor


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: str, device: str) -> Inputs:
    """Random heads from flat to peaked; the thresholds are the expected medians of their weights."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(3)
    )
    spread = torch.linspace(*_SPREAD, heads + 2, device=device)[1:-1]
    q *= spread[:, None, None]
    # The weights of a row are log-normal: exp(x) over a sum of N whose mean is exp(spread^2 / 2).
    return Inputs(q, k, v, (-spread.square() / 2).exp()[None] / tokens)


def dense_forward(x: Inputs, name: str) -> list[Tensor]:
    """The divisor; `name` is one of `SDPBackend`'s, or `CHOSEN`."""
    if name == CHOSEN:
        return [scaled_dot_product_attention(x.q, x.k, x.v)]
    with sdpa_kernel(SDPBackend.__members__[name]):
        return [scaled_dot_product_attention(x.q, x.k, x.v)]


def all_statistics(x: Inputs, backend: str) -> list[Tensor]:
    """Column sums and counts of five eps, and what is kept of every row."""
    found = layer_statistics(x.q, x.k, eps=EPS, backend=backend)
    return [found.mass, found.counts, found.rows.lse, found.rows.maximum, found.rows.entropy]


def nine_quantiles(x: Inputs, backend: str) -> list[Tensor]:
    """Thresholds at `RATIOS`."""
    return [pooled_quantiles(x.q, x.k, RATIOS, backend=backend)]


def both(x: Inputs, backend: str) -> list[Tensor]:
    """Statistics and thresholds, in one call that shares passes where the back end can."""
    found = layer_statistics(x.q, x.k, eps=EPS, ratios=RATIOS, backend=backend)
    return [found.mass, found.counts, found.thresholds, found.rows.lse, found.rows.maximum, found.rows.entropy]


def masked(x: Inputs, backend: str) -> list[Tensor]:
    """Output, realised ratio and dropped mass without the smaller half of the weights."""
    return list(masked_attention(x.q, x.k, x.v, x.thresholds, backend=backend))


DENSE, STATISTICS, QUANTILE, BOTH, MASKED = (
    "one dense forward", "statistics", "quantile", "statistics + quantile", "masked",
)  # fmt: skip
OPERATIONS: dict[str, Callable[[Inputs, str], list[Tensor]]] = {
    DENSE: dense_forward, STATISTICS: all_statistics, QUANTILE: nine_quantiles, BOTH: both, MASKED: masked,
}  # fmt: skip


def _bytes(found: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def host_added(operation: str, backend: str, tokens: int, heads: int, head_dim: int, dtype: str, threads: int) -> int:
    """Bytes that an operation adds to the peak memory of this process, its results left out.

    What it holds at a time: glibc would keep freed buffers of up to 32 MiB, more or fewer of them from run to run.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(*_MMAP_THRESHOLD)
    torch.set_num_threads(threads)
    OPERATIONS[operation](make_inputs(min(_WARM, tokens), heads, head_dim, dtype, "cpu"), backend)
    x = make_inputs(tokens, heads, head_dim, dtype, "cpu")
    before = host_peak(reset=True)
    found = OPERATIONS[operation](x, backend)
    return max(0, host_peak() - before - _bytes(found))


def added_bytes(operation: str, backend: str, x: Inputs, dtype: str) -> int:
    """Peak memory of an operation beyond its inputs and results; on a CPU that of a process of its own."""
    _, heads, tokens, head_dim = x.q.shape
    if not x.q.is_cuda:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            return pool.submit(host_added, operation, backend, tokens, heads, head_dim, dtype, threads).result()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = OPERATIONS[operation](x, backend)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(found)


def _seconds(operation: str, backend: str, x: Inputs) -> float:
    if x.q.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    OPERATIONS[operation](x, backend)
    if x.q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def dense_kernels(x: Inputs) -> dict[str, float]:
    """Best seconds of each dense kernel that can take x, the fastest first; on a CPU PyTorch's own choice."""
    names = [CHOSEN]
    if x.q.is_cuda:
        names = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]
        names += ["MATH"] if x.q.shape[2] <= _REFERENCE else []  # it stores all weights
    found = {}
    for name in names:
        with warnings.catch_warnings(), suppress(RuntimeError):  # "No available kernel"
            warnings.simplefilter("ignore")
            dense_forward(x, name)
            found[name] = min(_seconds(DENSE, name, x) for _ in range(3))
    return dict(sorted(found.items(), key=lambda item: item[1])) or {CHOSEN: _seconds(DENSE, CHOSEN, x)}


def errors(x: Inputs, mass: Tensor, counts: Tensor, thresholds: Tensor, out: Tensor, dense: Tensor) -> dict[str, float]:
    """How far results are from those of weights in float64.

    Args:
        x: what they were computed from.
        mass: (1, h, N) column sums.
        counts: (1, h, E, N) of `EPS`.
        thresholds: (1, h, R) of `RATIOS`.
        out: (1, h, N, d) attention masked at x.thresholds.
        dense: (1, h, N, d) attention.

    Returns:
        `sums`, largest relative error of a column sum; `counts`, sum of the differences in counts beyond the weights
        within 1e-6 of an eps; `rank`, realised minus wanted share below a threshold, the one furthest from 0;
        `output`, largest absolute error of an entry of the masked output, over rows of which no weight lies within
        1e-6, relative, of the threshold: rounding decides there; `dense`, that of the dense output, over all rows.
    """
    _, heads, tokens, _ = x.q.shape
    rows = max(1, _SLICE[x.q.device.type] // (heads * tokens))
    true_mass, true_counts = torch.zeros_like(mass, dtype=torch.float64), torch.zeros_like(counts)
    near, below = torch.zeros_like(counts), torch.zeros_like(thresholds, dtype=torch.float64)
    worst, worst_dense = torch.zeros(2, dtype=torch.float64, device=x.q.device)
    limit = x.thresholds.double()[..., None, None]
    for start in range(0, tokens, rows):
        here = slice(start, start + rows)
        weights = reference.attention_weights(x.q[:, :, here], x.k)
        part, above = reference.key_statistics(weights, EPS)
        true_mass += part
        true_counts += above
        for index, eps in enumerate(EPS):
            near[:, :, index] += ((weights - eps).abs() <= 1e-6).sum(dim=-2, dtype=torch.int32)
        for index in range(len(RATIOS)):
            below[..., index] += (weights < thresholds[..., index, None, None].double()).sum(dim=(-1, -2))
        wanted = reference.masked_attention(weights, x.v, x.thresholds)[0]
        clear = ((weights - limit).abs() > 1e-6 * limit).all(dim=-1, keepdim=True)
        worst = torch.maximum(worst, torch.where(clear, (out[:, :, here] - wanted).abs(), 0.0).amax())
        worst_dense = torch.maximum(worst_dense, (dense[:, :, here] - weights @ x.v.double()).abs().amax())
    share = (below / tokens**2 - torch.tensor(RATIOS, dtype=torch.float64, device=below.device)).flatten()
    return {
        "sums": float(((mass - true_mass) / true_mass).abs().amax()),
        "counts": float(((counts - true_counts).abs() - near).clamp(min=0).sum()),
        "rank": float(share[share.abs().argmax()]),
        "output": float(worst),
        "dense": float(worst_dense),
    }


def check(options: Options) -> tuple[Options, list[tuple[str, int]]]:
    """Options with the device's own values where none were given, and the back ends and lengths to be measured.

    Raises:
        ValueError: for sizes below one, an unknown number format, a back end or device that there is not.
    """
    kind = options.device.split(":")[0]
    if kind not in TOKENS or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"got device {options.device!r}, expected cpu, or cuda where torch sees a GPU.")
    options = replace(
        options,
        tokens=TOKENS[kind] if options.tokens is None else options.tokens,
        heads=HEADS[kind] if options.heads is None else options.heads,
        dtype=options.dtype or DTYPE[kind],
        backends=BACKENDS[kind] if options.backends is None else options.backends,
    )
    assert options.tokens is not None and options.backends is not None and options.dtype and options.heads is not None
    sizes = {"heads": options.heads, "head_dim": options.head_dim, "repeats": options.repeats}
    few = {name: size for name, size in sizes.items() if size < 1}
    if few or not options.tokens or min(options.tokens) < 1:
        raise ValueError(f"got tokens {list(options.tokens)} and {sizes}, expected at least 1 of each.")
    if options.dtype not in DTYPES:
        raise ValueError(f"got dtype {options.dtype!r}, expected one of {', '.join(DTYPES)}.")
    one = torch.zeros(1, 1, 1, 1, device=options.device)
    for backend in options.backends:
        choose_backend(backend, one, one)
    plan = []
    for backend in options.backends:
        longest = _REFERENCE if backend == "dense" else max(options.tokens)
        if backend == "chunked" and kind == "cuda":
            longest = min(options.tokens)
        plan += [(backend, n) for n in sorted(options.tokens) if options.all or n <= longest]
    if not plan:
        raise ValueError(
            f"got back ends {list(options.backends)} at {list(options.tokens)} tokens, none of which is measured "
            f"unless asked for: `dense` stores all weights. Give --all true, or at most {_REFERENCE} tokens."
        )
    return options, plan


def measure(x: Inputs, backend: str, dense: str, options: Options) -> Iterator[list[str]]:
    """The rows of a back end and a length; the same operations and divisor in every round."""
    tokens, device = x.q.shape[2], x.q.device.type
    which = {name: dense if name == DENSE else backend for name in OPERATIONS}
    x = replace(x, thresholds=nine_quantiles(x, backend)[0][..., MEDIAN])
    found = {name: OPERATIONS[name](x, which[name]) for name in OPERATIONS}  # compiles, allocates
    start, rounds = time.perf_counter(), list[dict[str, float]]()
    while not rounds or (len(rounds) < options.repeats and time.perf_counter() - start < _SECONDS[device]):
        rounds.append({name: _seconds(name, which[name], x) for name in OPERATIONS})
    heads = slice(None) if tokens <= _REFERENCE else slice(x.q.shape[1] // 2, x.q.shape[1] // 2 + 1)
    own = Inputs(x.q[:, heads], x.k[:, heads], x.v[:, heads], x.thresholds[:, heads])
    outputs = [found[name][0][:, heads] for name in (MASKED, DENSE)]
    apart = (*found[STATISTICS][:2], *found[QUANTILE])
    error = errors(own, *(result[:, heads] for result in apart), *outputs)
    shared = errors(own, *(result[:, heads] for result in found[BOTH][:3]), *outputs)
    said = {
        DENSE: f"output {error['dense']:.1e}",
        STATISTICS: f"sums {error['sums']:.1e}, counts {error['counts']:.0f}",
        QUANTILE: f"rank {error['rank']:+.1e}",
        BOTH: f"sums {shared['sums']:.1e}, counts {shared['counts']:.0f}, rank {shared['rank']:+.1e}",
        MASKED: f"output {error['output']:.1e}",
    }
    for name in OPERATIONS:
        times, ratios = [r[name] * 1000 for r in rounds], [r[name] / r[DENSE] for r in rounds]
        yield [
            f"SDPA ({dense.removesuffix('_ATTENTION').lower()})" if name == DENSE else backend,
            f"{tokens:,}", name,
            f"{median(times):,.1f} ({min(times):,.1f} .. {max(times):,.1f})",
            "1.00" if name == DENSE else f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
            str(len(rounds)),
            f"{added_bytes(name, which[name], x, str(options.dtype)) / 2**20:,.1f}",
            said[name],
        ]  # fmt: skip


def run(options: Options) -> Result:
    """Measures every back end at every length.

    Raises:
        ValueError: as `check`, before anything is measured.
    """
    options, plan = check(options)
    rows: list[list[str]] = []
    dense: dict[int, dict[str, float]] = {}
    for backend, tokens in plan:
        x = make_inputs(tokens, int(options.heads or 0), options.head_dim, str(options.dtype), options.device)
        if tokens not in dense:
            dense[tokens] = dense_kernels(x)
        for row in measure(x, backend, next(iter(dense[tokens])), options):
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)
    kernels = "; ".join(
        f"{tokens:,} tokens: " + ", ".join(f"{name.lower()} {seconds * 1000:.1f}" for name, seconds in found.items())
        for tokens, found in dense.items()
    )
    return Result(
        title=f"Attention statistics, quantiles and masks: {options.heads} heads x {options.head_dim}, {options.dtype}",
        columns=("back end", "tokens", "operation", "ms: median (least .. most)", "of dense", "rounds", "extra MiB",
                 "error against float64"),
        rows=rows,
        notes=(
            f"Statistics: row statistics, column sums, counts of {len(EPS)} eps. Quantile: {len(RATIOS)} ratios, "
            "0.1 to 0.9. Masked: half of the weights removed. At most as many rounds as asked for, interleaved; none "
            f"begins after {_SECONDS[x.q.device.type]:.0f} s.",
            f"Dense forwards, best of three in ms, the first is the divisor: {kernels}.",
            "Extra MiB: peak memory beyond inputs and results"
            + ("." if x.q.is_cuda else ", of a process of its own for each row that gives freed buffers back at once."),
            f"Errors are of all heads up to {_REFERENCE:,} tokens, of one head above. Sums: largest, relative. Counts: "
            "differences beyond weights within 1e-6 of an eps. Rank: realised minus wanted share of weights below a "
            "threshold, the furthest from 0. Output: largest, absolute, masked with the same threshold.",
        ),
    )  # fmt: skip
