// To be preloaded: what malloc and its kin hand out, in bytes, now and at most since the last reset.
#include <errno.h>
#include <malloc.h>
#include <stddef.h>

#include <atomic>

extern "C" {

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

}  // extern "C"

namespace {

std::atomic<long> used{0}, most{0};

void* took(void* block) {
  const long size = block ? static_cast<long>(malloc_usable_size(block)) : 0;
  const long now = used.fetch_add(size) + size;
  long seen = most.load();
  while (now > seen && !most.compare_exchange_weak(seen, now)) {
  }
  return block;
}

void gave(void* block) {
  if (block) used -= static_cast<long>(malloc_usable_size(block));
}

}  // namespace

extern "C" {

void* malloc(size_t size) { return took(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return took(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return took(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block || size == 0 ? 0 : ENOMEM;
}
void* realloc(void* block, size_t size) {
  gave(block);
  void* moved = __libc_realloc(block, size);
  if (!moved && size != 0) took(block);  // left as it was
  return took(moved);
}
void free(void* block) {
  gave(block);
  __libc_free(block);
}

/// Bytes in use; the peak counts from here.
long malloc_reset() {
  most = used.load();
  return most;
}
long malloc_peak() { return most; }

}  // extern "C"
