"""Hopper's wgmma as C++ functions, whose many registers have to be named one by one."""

from __future__ import annotations


def wgmma(num_tokens: int) -> str:
    """wgmma<num_tokens>(d, a, rows): d[64, num_tokens] += a[64, 16] by bf16 rows [num_tokens, 16], by a warpgroup.

    d and a are a lane's part, rows says where and how they lie in shared memory. It is only started: panels_wgmma.cuh.
    """
    n = num_tokens // 2
    sums = ",".join(f"%{i}" for i in range(n))
    a0, a1, a2, a3, rows = (f"%{n + i}" for i in range(5))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{num_tokens}k16.f32.bf16.bf16"
    outputs = ",".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""template <>
__device__ void wgmma<{num_tokens}>(float (&d)[kTileRows / 2], const u32 (&a)[4], u64 rows) {{
  asm volatile("{{.reg .pred adds; setp.ne.b32 adds, 1, 0;"
               "{instruction} {{{sums}}}, {{{a0},{a1},{a2},{a3}}}, {rows}, adds, 1, 1, 0;}}"
               : {outputs}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows));
}}"""


def wgmmas(most_tokens: int) -> str:
    """For 16, 32... tokens."""
    declaration = "template <int kWidth>\n__device__ void wgmma(float (&d)[kTileRows / 2], const u32 (&a)[4], u64 rows);"
    return "\n".join((declaration, *map(wgmma, range(16, most_tokens + 1, 16))))
