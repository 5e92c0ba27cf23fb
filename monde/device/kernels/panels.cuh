// What panels.cu and its products share: stages in shared memory.

constexpr int kPanelThreads = 32 * kPanelWarps;
constexpr int kTile = 32, kTileBytes = 16 * kTile * 2;  // inputs, and their bytes of one panel
constexpr int kCopiedRows = (kTileRows * 4 + kPanelThreads - 1) / kPanelThreads;  // by one thread, 16 bytes of each

struct Stage {
  uint4 rows[kTileRows][4];          // 32 inputs of a row, swizzled
  uint4 panels[kPanelWarps][2][64];  // a tile of both panels of a warp, as they lie in memory
};
static_assert(sizeof(Stage) % 512 == 0, "the swizzle is one of addresses");

// Of a warp's two panels by the tokens of an item.
typedef float Sums[2][kTileRows / 2];

// Where 16 bytes of a row lie, so that eight rows' are read at a time.
__device__ int place_of(int row, int piece) { return piece ^ row / 2 % 4; }

__device__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ void copy_piece(uint4* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
