// panels.cu's products by Hopper's wgmma: warpgroups multiply panels in registers by rows in shared memory, and go on
// while they do. The instructions, `wgmma` by number of tokens, come from kernels/wgmma.py.

constexpr int kLag = 2;  // stages before the present one whose rows may be in use yet, and itself

// This thread's copies become visible to the tensor cores, behind a barrier.
__device__ void publish_rows() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// f(Width<rows, rounded up to 16>): an instruction is one of so many.
template <int kLeast = 16, int kMost = kTileRows, typename F>
__device__ void with_width(int num_rows, const F& f) {
  constexpr int kMiddle = (kLeast + kMost) / 32 * 16;
  if constexpr (kLeast == kMost)
    f(Width<kMost>());
  else if (num_rows <= kMiddle)
    with_width<kLeast, kMiddle>(num_rows, f);
  else
    with_width<kMiddle + 16, kMost>(num_rows, f);
}

// Starts acc += panels a [2][16 rows][16 inputs] by the inputs from 16 * step on of num_rows rows.
__device__ void multiply_step(Sums& acc, const u32 (&a)[2][4], const uint4 (*rows)[4], int step, int num_rows) {
  // Rows of 64 bytes, swizzled (place_of), eight rows after 512 bytes.
  const u64 matrix = u64(2) << 62 | u64(512 / 16) << 32 | u64(1) << 16 | (shared_address(rows) + 32 * step) / 16;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  with_width(num_rows, [&](auto width) {
    wgmma<decltype(width)::value>(acc[0], a[0], matrix);
    wgmma<decltype(width)::value>(acc[1], a[1], matrix);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  });
}

// But for the latest one: its registers may change.
__device__ void wait_for_earlier_steps() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// The sums are there; the compiler does not read them earlier.
__device__ void wait_for_steps(Sums& acc) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int p = 0; p < 2; ++p)
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) asm volatile("" : "+f"(acc[p][i])::"memory");
}
