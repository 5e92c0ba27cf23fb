"""kt-kernel's bf16 MoE layer: `peer_kt.py BATCH THREADS SECONDS`, with kt_kernel on PYTHONPATH."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from kt_kernel import kt_kernel_ext
from peer_steps import D, E, F, K, L, random_experts, random_routings, report

batch, num_threads, seconds_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
workers = kt_kernel_ext.WorkerPoolConfig()
workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [num_threads]
cpu = kt_kernel_ext.CPUInfer(workers)
expert_map = torch.arange(E, dtype=torch.int64)
kernels = [kt_kernel_ext.moe.AMXBF16_MOE, kt_kernel_ext.moe.AVX2BF16_MOE]
has_bf16_dots = "avx512_bf16" in Path("/proc/cpuinfo").read_text()

layers = []
for seed in range(L):
    gate_EFD, up_EFD, down_EDF = random_experts(seed)
    config = kt_kernel_ext.moe.MOEConfig(E, K, D, F, 0)
    config.max_len, config.pool = -(-batch // 32) * 32, cpu.backend_
    config.gate_proj, config.up_proj, config.down_proj = (
        gate_EFD.data_ptr(),
        up_EFD.data_ptr(),
        down_EDF.data_ptr(),
    )
    config.gate_scale = config.up_scale = config.down_scale = 0
    layer = kernels[0 if has_bf16_dots else 1](config)
    cpu.submit(layer.load_weights_task(expert_map.data_ptr()))
    cpu.sync()
    layers.append((layer, gate_EFD, up_EFD, down_EDF))

routings = random_routings(batch)
weights_TK, x_TD, y_TD = (
    torch.rand(batch, K),
    torch.randn(batch, D).bfloat16(),
    torch.empty(batch, D).bfloat16(),
)
batch_1 = torch.tensor([batch])


def step(i: int) -> None:
    ids_TK = routings[i % len(routings)]
    cpu.submit(
        layers[i % L][0].forward_task(
            batch_1.data_ptr(),
            K,
            ids_TK.data_ptr(),
            weights_TK.data_ptr(),
            x_TD.data_ptr(),
            y_TD.data_ptr(),
            False,
        )
    )
    cpu.sync()


report(step, seconds_s)
