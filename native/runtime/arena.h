// Host memory for one layer's experts: one page-aligned range, huge pages where the system gives them, touched first
// by whoever packs (so that pages land on the packer's NUMA node), and pinnable as a whole.
#pragma once
#include <cstddef>

namespace monde {

class Arena {
 public:
  // Reserves address space; memory is taken when it is first written. Errors: std::bad_alloc.
  explicit Arena(size_t num_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  unsigned char* data() const { return data_; }
  size_t num_bytes() const { return num_bytes_; }
  // Gives the whole pages inside [offset, offset + num_bytes) back to the system.
  void discard(size_t offset, size_t num_bytes);

 private:
  unsigned char* data_;
  size_t num_bytes_;
};

}  // namespace monde
