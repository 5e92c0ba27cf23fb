"""Machines that nobody here needs to own: profiles written down from data sheets, with what is assumed.

Rule of thumb where nothing was measured: 80% of the memory's and 85% of the bus's nominal rate, half of a
processor's nominal arithmetic at many tokens, and the overlaps and latencies of the measured machine.
"""

from __future__ import annotations

from monde.planning.fit import AlphaBeta
from monde.planning.profile import (
    Curve,
    ExpertRate,
    GpuProfile,
    HardwareProfile,
    MachineIdentity,
    MemoryChannels,
    Overlap,
    PromptLaunches,
)

# A captured layer with experts of next to nothing takes 36 to 39 us for one token; 128 KiB take 30 more than 8 KiB.
_DOORBELL = AlphaBeta(36e-6, 2.46e-10)
_COPY_LATENCY_S = 10e-6  # queued behind another copy; 15-17 us when the host waits for it
_SHARED_DRAM = Overlap(1.15, 1.10)  # assumed until measured: host and copies share one memory
_SAME_HBM = Overlap(1.02, 1.02)
# 2.9 ms for a captured step of 48 blocks without experts, 512 tokens in the cache, on an H200: 0.6 ms read weights.
BLOCK_OVERHEAD_S = 48e-6
# Expert layers of 8 and 83 experts, all resident, take 46 and 304 us there: this much before the first.
DECODE_LAYER_S = 19e-6
# Layers of 512 tokens, all resident, take 1.4 ms there, of which 0.4 read the weights. On an H200 four tenths of the
# rest come before anything starts; host and bus take this much longer than their experts. Layers of 128 tokens, all
# resident, one after the other, take 0.66 ms there, of which the GPU has something to do in half.
PROMPT_LAUNCHES = PromptLaunches(0.4e-3, 0.6e-3, 0.45e-3, 0.45e-3, 0.6e-3)
# 48 to 56 ms for a step of 48 blocks without experts that Python launches, whatever the GPU does with it.
EAGER_BLOCK_S = 1.05e-3
# A call of a bank from Python, and a replayed step of four blocks beside them, on an H200.
HOST_CALL_S = 0.08e-3
STEP_S = 0.35e-3


def _machine(
    name: str,
    cpu: str,
    num_cores: int,
    gpu: str,
    source: str,
    *,
    host_gib: int,
    host_gbytes_per_s: float,
    host_tflops_per_s: Curve,
    bus_gbytes_per_s: float,
    gpu_gib: float,
    gpu_gbytes_per_s: float,
    gpu_tflops_per_s: float | Curve,
    host_read: Curve | None = None,
    channels: MemoryChannels | None = None,
    host_while_copying: Overlap = _SHARED_DRAM,
    round_trip: AlphaBeta = _DOORBELL,
    prompt: PromptLaunches = PROMPT_LAUNCHES,
) -> HardwareProfile:
    """A profile from headline figures; tflops_per_s are over tokens of an expert, in units of 1e12."""
    bus = AlphaBeta(_COPY_LATENCY_S, 1e-9 / bus_gbytes_per_s)
    # A tensor core tile is 64 to 128 rows high: fewer tokens leave it partly empty.
    if not isinstance(gpu_tflops_per_s, Curve):
        gpu_tflops_per_s = Curve((1, 16, 128), tuple(gpu_tflops_per_s * f for f in (0.02, 0.25, 1.0)))
    gpu_flops, host_flops = (
        Curve(curve.x, tuple(1e12 * y for y in curve.y)) for curve in (gpu_tflops_per_s, host_tflops_per_s)
    )
    return HardwareProfile(
        machine=MachineIdentity(name, cpu, num_cores, gpu, ""),
        source=source,
        memory_bytes=host_gib * 2**30,
        host_read=host_read or Curve((float(num_cores),), (host_gbytes_per_s * 1e9,)),
        host_expert=ExpertRate(2e-6, host_gbytes_per_s * 1e9, host_flops),
        gpu=GpuProfile(
            memory_bytes=int(gpu_gib * 2**30),
            expert=ExpertRate(1e-6, gpu_gbytes_per_s * 1e9, gpu_flops),
            h2d=bus,
            d2h=bus,
            zero_copy_bytes_per_s=bus_gbytes_per_s * 1e9 * 0.95,
            round_trip=round_trip,
            host_while_copying=host_while_copying,
            gpu_while_copying=_SAME_HBM,
            block_overhead_s=BLOCK_OVERHEAD_S,
            decode_layer_s=DECODE_LAYER_S,
            prompt=prompt,
        ),
        host_call_s=HOST_CALL_S,
        eager_block_s=EAGER_BLOCK_S,
        step_s=STEP_S,
        memory_channels=channels,
    )


DESCRIBED: dict[str, HardwareProfile] = {
    profile.machine.name: profile
    for profile in (
        _machine(
            "h200",
            "16 virtual cores of an Emerald Rapids Xeon (AMX)",
            16,
            "NVIDIA H200",
            "measured by `monde calibrate` on 15 host threads: reading by threads, bus, AMX by tokens, host beside copies, "
            "for experts of 2048x768 in bf16; the grouped products of the GPU alone; round trip, launches and graphs there "
            "and on an H100. Assumed: the rate of fewer than 128 tokens on the GPU, where reading hides it, and 0.6 TFLOP/s of the host at one token, where reading hides it",
            host_gib=126,
            host_gbytes_per_s=123,
            host_read=Curve((1, 2, 4, 8, 15), (12.7e9, 27.1e9, 54.1e9, 93.2e9, 131e9)),
            host_tflops_per_s=Curve((1, 16, 32, 64, 128), (0.6, 1.62, 2.98, 4.49, 5.55)),
            bus_gbytes_per_s=56.8,
            gpu_gib=139.8,
            gpu_gbytes_per_s=3700,
            gpu_tflops_per_s=Curve((1, 16, 32, 64, 128), (20, 120, 200, 290, 340)),
            host_while_copying=Overlap(1.34, 1.37),
        ),
        _machine(
            "laptop-4060",
            "8 cores, AVX2, two channels of DDR5-5600 (89.6 GB/s)",
            8,
            "NVIDIA GeForce RTX 4060 Laptop, PCIe 4.0 x8",
            "data sheets: 8 GB at 256 GB/s, PCIe 15.8 GB/s; AVX2 fp32 at half of 1.0 TFLOP/s",
            host_gib=32,
            host_gbytes_per_s=70,
            channels=MemoryChannels(2, 44.8e9),
            host_tflops_per_s=Curve((1, 16), (0.1, 0.5)),
            bus_gbytes_per_s=13.4,
            gpu_gib=8,
            gpu_gbytes_per_s=205,
            gpu_tflops_per_s=30,
        ),
        _machine(
            "epyc-4090",
            "64 cores Genoa, AVX-512-BF16, twelve channels of DDR5-4800 (461 GB/s)",
            64,
            "NVIDIA GeForce RTX 4090, PCIe 4.0 x16",
            "data sheets: 24 GB at 1008 GB/s, 165 TFLOP/s; PCIe 31.5 GB/s; AVX-512-BF16 at half of 12 TFLOP/s",
            host_gib=384,
            host_gbytes_per_s=370,
            channels=MemoryChannels(12, 38.4e9),
            host_tflops_per_s=Curve((1, 16, 64), (0.5, 4.0, 6.0)),
            bus_gbytes_per_s=26.8,
            gpu_gib=24,
            gpu_gbytes_per_s=806,
            gpu_tflops_per_s=82,
        ),
        _machine(
            "desktop-5090",
            "16 cores Zen 5, AVX-512-BF16, two channels of DDR5-6000 (96 GB/s)",
            16,
            "NVIDIA GeForce RTX 5090, PCIe 5.0 x16",
            "data sheets: 32 GB at 1792 GB/s, 209 TFLOP/s; PCIe 63 GB/s; AVX-512-BF16 at half of 9 TFLOP/s. Copies "
            "take most of the memory's bandwidth: overlap 1.6 and 1.3 assumed",
            host_gib=96,
            host_gbytes_per_s=77,
            channels=MemoryChannels(2, 48e9),
            host_tflops_per_s=Curve((1, 16, 64), (0.15, 2.0, 4.5)),
            bus_gbytes_per_s=53.6,
            gpu_gib=32,
            gpu_gbytes_per_s=1430,
            gpu_tflops_per_s=105,
            host_while_copying=Overlap(1.6, 1.3),
        ),
        _machine(
            "xeon-2s-a100",
            "2 x 56 cores Sapphire Rapids (AMX), 2 x eight channels of DDR5-4800 (614 GB/s)",
            112,
            "NVIDIA A100 40 GB, PCIe 4.0 x16",
            "data sheets: 40 GB at 1555 GB/s, 312 TFLOP/s; PCIe 31.5 GB/s; AMX 21 TFLOP/s a socket as published for "
            "kernels of this kind; experts lie on the node of the cores that read them",
            host_gib=512,
            host_gbytes_per_s=490,
            channels=MemoryChannels(16, 38.4e9),
            host_tflops_per_s=Curve((1, 16, 64, 256), (0.6, 8.0, 25.0, 42.0)),
            bus_gbytes_per_s=26.8,
            gpu_gib=40,
            gpu_gbytes_per_s=1240,
            gpu_tflops_per_s=156,
        ),
        _machine(
            "monde-device",
            "near-data processor in a memory device of 512 GB/s (simulated in the MoNDE paper)",
            1,
            "NVIDIA A100 40 GB, PCIe 4.0 x16",
            "the paper's memory and bus rates, both nominal, as a simulation uses them. Assumed: arithmetic that "
            "keeps up with the memory at four tokens of bf16 and no further; round trip of the bus alone; copies "
            "take their bytes out of the 512 GB/s; nothing but the transfers for a layer's launches",
            host_gib=512,
            host_gbytes_per_s=512,
            host_tflops_per_s=Curve((1,), (2.048,)),
            bus_gbytes_per_s=31.5,
            gpu_gib=40,
            gpu_gbytes_per_s=1555,
            gpu_tflops_per_s=156,
            host_while_copying=Overlap(1.065, 1.0),
            round_trip=AlphaBeta(4e-6, 2e-9 / 31.5),
            prompt=PromptLaunches.none(),
        ),
    )
}  # fmt: skip
