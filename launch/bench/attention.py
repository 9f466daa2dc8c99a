"""`reblock bench attention`: time, memory and error of the attention engine, against one dense forward.

Times are divided by that of `F.scaled_dot_product_attention` on the same q, k and v, with the fastest back end on CUDA.
A round runs the dense forward and every operation once, and ratios are taken within a round, so that a busy machine
slows all of them alike. Errors are relative to float64 weights, of all heads if that is cheap and otherwise of one.
Each row is printed to standard error as soon as it is measured.

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
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from launch.bench.attention_errors import DTYPES, RATIOS, AttentionInputs, errors, make_inputs
from launch.bench.host_memory import host_peak
from launch.bench.result import BenchResult, choose_device
from trainer.attention import EPS, layer_statistics, masked_attention, pooled_quantiles
from trainer.attention.api import choose_backend

MEDIAN = RATIOS.index(0.5)

#: Default lengths, heads, dtype and back ends by device.
TOKENS = {"cpu": (2048, 4096, 8192), "cuda": (11_130, 23_850, 44_776)}
HEADS = {"cpu": 4, "cuda": 24}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
BACKENDS = {"cpu": ("chunked", "dense"), "cuda": ("triton", "chunked")}

#: Largest number of tokens for the dense back end and for errors of all heads; with more, one head is compared.
_REFERENCE = 2048
#: Seconds after which no further round of a back end and length starts.
_SECONDS = {"cpu": 120.0, "cuda": 10.0}
#: Tokens of a first call, which sets up libraries and threads of a fresh process before its memory is read.
_WARM = 64
#: Arguments of glibc's mallopt: M_MMAP_THRESHOLD in bytes. Larger buffers return to the system when they are freed.
_MMAP_THRESHOLD = (-3, 2**20)
#: Name for PyTorch's own choice among its dense kernels, the only option on a CPU.
CHOSEN = "default"


def dense_forward(x: AttentionInputs, name: str) -> list[Tensor]:
    """PyTorch's attention with the kernel `name`, which is one of `SDPBackend` or `CHOSEN`."""
    if name == CHOSEN:
        return [scaled_dot_product_attention(x.q, x.k, x.v)]
    with sdpa_kernel(SDPBackend.__members__[name]):
        return [scaled_dot_product_attention(x.q, x.k, x.v)]


def all_statistics(x: AttentionInputs, backend: str) -> list[Tensor]:
    """Column sums, counts for each eps, and statistics of every row."""
    found = layer_statistics(x.q, x.k, eps=EPS, backend=backend)
    return [found.mass, found.counts, found.rows.lse, found.rows.maximum, found.rows.entropy]


def nine_quantiles(x: AttentionInputs, backend: str) -> list[Tensor]:
    """Thresholds at `RATIOS`."""
    return [pooled_quantiles(x.q, x.k, RATIOS, backend=backend)]


def statistics_and_quantiles(x: AttentionInputs, backend: str) -> list[Tensor]:
    """Statistics and thresholds in one call, in which a back end may share passes."""
    found = layer_statistics(x.q, x.k, eps=EPS, ratios=RATIOS, backend=backend)
    return [found.mass, found.counts, found.thresholds, found.rows.lse, found.rows.maximum, found.rows.entropy]


def masked(x: AttentionInputs, backend: str) -> list[Tensor]:
    """Output, realised ratio and dropped mass without the smaller half of the weights."""
    return list(masked_attention(x.q, x.k, x.v, x.thresholds, backend=backend))


DENSE, STATISTICS, QUANTILE, BOTH, MASKED = (
    "one dense forward", "statistics", "quantile", "statistics + quantile", "masked",
)  # fmt: skip
OPERATIONS: dict[str, Callable[[AttentionInputs, str], list[Tensor]]] = {
    DENSE: dense_forward, STATISTICS: all_statistics, QUANTILE: nine_quantiles, BOTH: statistics_and_quantiles,
    MASKED: masked,
}  # fmt: skip


def _bytes(found: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def host_added(operation: str, backend: str, tokens: int, heads: int, head_dim: int, dtype: str, threads: int) -> int:
    """Bytes that an operation adds to the peak memory of this process, without its results.

    Freed buffers return to the system at once. Otherwise glibc would keep a varying number of buffers up to 32 MiB.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(*_MMAP_THRESHOLD)
    torch.set_num_threads(threads)
    OPERATIONS[operation](make_inputs(min(_WARM, tokens), heads, head_dim, dtype, "cpu"), backend)
    x = make_inputs(tokens, heads, head_dim, dtype, "cpu")
    before = host_peak(reset=True)
    found = OPERATIONS[operation](x, backend)
    return max(0, host_peak() - before - _bytes(found))


def added_bytes(operation: str, backend: str, x: AttentionInputs, dtype: str) -> int:
    """Bytes of an operation's peak memory beyond inputs and results; on a CPU they are measured in a new process."""
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


def _seconds(operation: str, backend: str, x: AttentionInputs) -> float:
    if x.q.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    OPERATIONS[operation](x, backend)
    if x.q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def dense_kernels(x: AttentionInputs) -> dict[str, float]:
    """Best seconds of each dense kernel that supports x, fastest first; on a CPU only of PyTorch's own choice."""
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


def device_kind(device: str) -> str:
    """`cpu` or `cuda`.

    Raises:
        ValueError: if it is another device, or torch does not see it.
    """
    kind = device.split(":")[0]
    if kind not in TOKENS or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"got device {device!r}, expected cpu, or cuda where torch sees a GPU.")
    return kind


def check_sizes(tokens: Sequence[int], dtype: str, **sizes: int) -> None:
    """Raises ValueError for sizes below 1 or an unknown dtype."""
    if any(size < 1 for size in sizes.values()) or not tokens or min(tokens) < 1:
        raise ValueError(f"got tokens {list(tokens)} and {sizes}, expected at least 1 of each.")
    if dtype not in DTYPES:
        raise ValueError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}.")


def measured_lengths(
    device: str, tokens: Sequence[int], backends: Sequence[str], *, all: bool
) -> list[tuple[str, int]]:
    """Pairs of back end and length to measure; pairs that need much time or memory only with `all`.

    Raises:
        ValueError: if a back end is unknown, or there is nothing to measure.
    """
    kind, one = device_kind(device), torch.zeros(1, 1, 1, 1, device=device)
    for backend in backends:
        choose_backend(backend, one, one)
    lengths = []
    for backend in backends:
        longest = _REFERENCE if backend == "dense" else max(tokens)
        if backend == "chunked" and kind == "cuda":
            longest = min(tokens)
        lengths += [(backend, n) for n in sorted(tokens) if all or n <= longest]
    if not lengths:
        raise ValueError(
            f"got back ends {list(backends)} at {list(tokens)} tokens, none of which is measured "
            f"unless asked for: `dense` stores all weights. Give --all true, or at most {_REFERENCE} tokens."
        )
    return lengths


def measure(x: AttentionInputs, backend: str, dense: str, *, repeats: int, dtype: str) -> Iterator[list[str]]:
    """Measures a back end at one length; yields one row of the table per operation."""
    tokens, device = x.q.shape[2], x.q.device.type
    which = {name: dense if name == DENSE else backend for name in OPERATIONS}
    x = replace(x, thresholds=nine_quantiles(x, backend)[0][..., MEDIAN])
    found = {name: OPERATIONS[name](x, which[name]) for name in OPERATIONS}  # compiles kernels and allocates memory
    start, rounds = time.perf_counter(), list[dict[str, float]]()
    while not rounds or (len(rounds) < repeats and time.perf_counter() - start < _SECONDS[device]):
        rounds.append({name: _seconds(name, which[name], x) for name in OPERATIONS})
    heads = slice(None) if tokens <= _REFERENCE else slice(x.q.shape[1] // 2, x.q.shape[1] // 2 + 1)
    own = AttentionInputs(x.q[:, heads], x.k[:, heads], x.v[:, heads], x.thresholds[:, heads])
    outputs = [found[name][0][:, heads] for name in (MASKED, DENSE)]
    apart = (*found[STATISTICS][:2], *found[QUANTILE])
    error = errors(own, *(result[:, heads] for result in apart), *outputs)
    shared = errors(own, *(result[:, heads] for result in found[BOTH][:3]), *outputs)
    errors_of = {
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
            f"{added_bytes(name, which[name], x, dtype) / 2**20:,.1f}",
            errors_of[name],
        ]  # fmt: skip


def run(
    *,
    device: str = "auto",
    repeats: int = 7,
    tokens: tuple[int, ...] | None = None,
    heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    backends: tuple[str, ...] | None = None,
    all: bool = False,
) -> BenchResult:
    """Measures the attention engine's back ends at several lengths, against one dense forward.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        repeats: number of timed, interleaved rounds at each length.
        tokens: lengths in tokens; None for 2,048 to 8,192 on a CPU, 11,130 to 44,776 on a GPU.
        heads: number of attention heads; None for 4 on a CPU, 24 on a GPU.
        head_dim: width of a head.
        dtype: float32, bfloat16 or float16; None for float32 on a CPU, bfloat16 on a GPU.
        backends: any of `dense`, `chunked`, `triton`; None for chunked, dense on a CPU and triton, chunked on a GPU.
        all: whether to measure `dense` above 2,048 tokens too, and `chunked` on a GPU above the smallest length.

    Raises:
        ValueError: if an option is invalid; raised before anything is measured.
    """
    device = choose_device(device)
    kind = device_kind(device)
    tokens = TOKENS[kind] if tokens is None else tokens
    backends = BACKENDS[kind] if backends is None else backends
    heads, dtype = HEADS[kind] if heads is None else heads, dtype or DTYPE[kind]
    check_sizes(tokens, dtype, heads=heads, head_dim=head_dim, repeats=repeats)
    rows: list[list[str]] = []
    kernel_seconds: dict[int, dict[str, float]] = {}
    for backend, length in measured_lengths(device, tokens, backends, all=all):
        x = make_inputs(length, heads, head_dim, dtype, device)
        if length not in kernel_seconds:
            kernel_seconds[length] = dense_kernels(x)
        fastest = next(iter(kernel_seconds[length]))
        for row in measure(x, backend, fastest, repeats=repeats, dtype=dtype):
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)
    kernels = "; ".join(
        f"{length:,} tokens: " + ", ".join(f"{name.lower()} {seconds * 1000:.1f}" for name, seconds in found.items())
        for length, found in kernel_seconds.items()
    )
    return BenchResult(
        title=f"Attention statistics, quantiles and masks: {heads} heads x {head_dim}, {dtype}",
        columns=("back end", "tokens", "operation", "ms: median (least .. most)", "of dense", "rounds", "extra MiB",
                 "error against float64"),
        rows=rows,
        notes=(
            f"Statistics: row statistics, column sums, counts of {len(EPS)} eps. Quantile: {len(RATIOS)} ratios, "
            "0.1 to 0.9. Masked: half of the weights removed. At most as many rounds as asked for, interleaved; none "
            f"begins after {_SECONDS[kind]:.0f} s.",
            f"Dense forwards, best of three in ms, the first is the divisor: {kernels}.",
            "Extra MiB: peak memory beyond inputs and results"
            + ("" if kind == "cuda" else ", of a process of its own for each row that gives freed buffers back at once")
            + ".",
            f"Errors are of all heads up to {_REFERENCE:,} tokens, of one head above. Sums: largest, relative. Counts: "
            "differences beyond weights within 1e-6 of an eps. Rank: realised minus wanted share of weights below a "
            "threshold, the furthest from 0. Output: largest, absolute, masked with the same threshold.",
        ),
        device=device,
    )  # fmt: skip
