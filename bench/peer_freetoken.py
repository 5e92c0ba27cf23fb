"""FreeToken's bf16 MoE layer: `peer_freetoken.py BATCH THREADS SECONDS SHARED_OBJECT` (its extension)."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from peer_steps import D, E, F, K, L, random_experts, random_routings, report

batch, num_threads, seconds_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
found = importlib.util.spec_from_file_location("_cpu_moe", sys.argv[4])
assert found is not None
assert found.loader is not None
freetoken = importlib.util.module_from_spec(found)
found.loader.exec_module(freetoken)

banks = []
for seed in range(L):
    gate_EFD, up_EFD, down_EDF = random_experts(seed)
    banks.append({"gate_up": torch.cat([gate_EFD, up_EFD], 1), "down": down_EDF})
addresses = {role: torch.tensor([bank[role].data_ptr() for bank in banks]) for role in ("gate_up", "down")}
x_TD, y_TD = torch.randn(batch, D).bfloat16(), torch.empty(batch, D).bfloat16()
ids_TK, weights_TK = torch.zeros(batch, K, dtype=torch.int32), torch.rand(batch, K)
executor = freetoken.CpuMoeExecutor(
    num_threads=num_threads,
    num_layers=L,
    num_experts=E,
    top_k=K,
    hidden_size=D,
    inter_size=F,
    max_tokens=batch,
    activation_id=0,
    apply_router_weight_on_input=0,
    formats=[("bf16", {role: table.data_ptr() for role, table in addresses.items()}, {})],
    layer_formats=[0] * L,
    swiglu_alpha=1.702,
    swiglu_limit=float("inf"),
    core_ids=sorted(os.sched_getaffinity(0))[:num_threads],
    x_ptr=x_TD.data_ptr(),
    ids_ptr=ids_TK.data_ptr(),
    w_ptr=weights_TK.data_ptr(),
    y_ptr=y_TD.data_ptr(),
)
routings = [ids.int() for ids in random_routings(batch)]


def step(i: int) -> None:
    ids_TK.copy_(routings[i % len(routings)])
    executor.run(i % L, batch)


report(step, seconds_s)
