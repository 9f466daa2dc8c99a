"""Assumed performance of a cluster. The plan measures none of it; every figure is an option."""

from dataclasses import dataclass, fields

MIB, GIB = 2**20, 2**30

#: Default memory of a GPU in GiB: the usable part of an 80 GB card.
GPU_GIB = 79.0


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU, its node and the network. Defaults: data sheets of eight H100 SXM in a node with eight 400 Gb/s adapters.

    Args:
        gpus_per_node: GPUs per node, if the recipe does not give a number.
        memory_gib: memory of a GPU that a process can use, in GiB.
        tflops: peak of dense matrix products in 16 bits, in 10^12 operations a second.
        tflops_float32: peak of dense matrix products in float32, in 10^12 operations a second.
        share: share of the peak that training steps reach. docs/benchmarks.md: 0.46 on an H200 at 163 frames.
        memory_tb_s: bandwidth of the GPU's memory in 10^12 bytes a second, for the optimiser.
        intra_gb_s: bandwidth between two GPUs of a node, each way, in 10^9 bytes a second.
        inter_gb_s: bandwidth of all network adapters of a node together, each way, in 10^9 bytes a second.
        link_share: share of these bandwidths that collectives reach.
        latency_us: latency of one message in 10^-6 seconds.
    """

    gpus_per_node: int = 8
    memory_gib: float = GPU_GIB
    tflops: float = 989.0
    tflops_float32: float = 67.0
    share: float = 0.46
    memory_tb_s: float = 3.35
    intra_gb_s: float = 450.0
    inter_gb_s: float = 400.0
    link_share: float = 0.7
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        faults = [f"hardware.{f.name} {getattr(self, f.name)}" for f in fields(self) if not getattr(self, f.name) > 0]
        faults += [
            f"hardware.{name} {getattr(self, name)}" for name in ("share", "link_share") if getattr(self, name) > 1
        ]
        if faults:
            raise ValueError(f"got {', '.join(faults)}; expected figures above 0, and shares of at most 1.")

    @property
    def memory(self) -> int:
        """Memory of a GPU in bytes."""
        return int(self.memory_gib * GIB)

    def flops(self, sixteen_bit: bool) -> float:
        """Operations a second that matrix products reach, in 16 bits or in float32."""
        return (self.tflops if sixteen_bit else self.tflops_float32) * 1e12 * self.share

    def bandwidth(self, nodes: int, at_once: int = 1) -> float:
        """Bandwidth of a ring over the GPUs of some nodes, in bytes a second.

        Collectives use as many rings as a node has adapters, so all adapters of a node work together.

        Args:
            nodes: number of nodes in the ring.
            at_once: number of concurrent collectives that share the same adapters.
        """
        links = self.intra_gb_s if nodes == 1 else min(self.intra_gb_s, self.inter_gb_s / at_once)
        return links * 1e9 * self.link_share
