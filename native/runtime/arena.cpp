#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace monde {

Arena::Arena(size_t num_bytes) : num_bytes_(num_bytes ? num_bytes : 1) {
  void* mapped = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<unsigned char*>(mapped);
#if defined(MADV_HUGEPAGE)
  madvise(data_, num_bytes_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(data_, num_bytes_); }

void Arena::discard(size_t offset, size_t num_bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t begin = (offset + page - 1) / page * page, end = (offset + num_bytes) / page * page;
  if (begin < end) madvise(data_ + begin, end - begin, MADV_DONTNEED);
}

}  // namespace monde
