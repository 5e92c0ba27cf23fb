// panels.cu's products by mma.sync, done when they return.

constexpr int kLag = 1;  // stages before the present one whose rows may be in use yet, and itself

__device__ void publish_rows() {}

// acc += panels a [2][16 rows][16 inputs] by the inputs from 16 * step on of num_rows rows.
__device__ void multiply_step(Sums& acc, const u32 (&a)[2][4], const uint4 (*rows)[4], int step, int num_rows) {
  const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, piece = 2 * step + lane / 8 % 2;
  const u32 at = shared_address(&rows[row][place_of(row, piece)]);
#pragma unroll
  for (int n = 0; n < kTileRows; n += 16) {
    if (n >= num_rows) continue;
    u32 b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at + n * u32(sizeof(rows[0])))
                 : "memory");
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      mma<1>(acc[p] + n / 2, a[p][0], a[p][1], a[p][2], a[p][3], b[0], b[1]);
      mma<1>(acc[p] + n / 2 + 4, a[p][0], a[p][1], a[p][2], a[p][3], b[2], b[3]);
    }
  }
}

__device__ void wait_for_earlier_steps() {}

__device__ void wait_for_steps(Sums& acc) {}
