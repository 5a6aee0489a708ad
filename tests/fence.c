// Memory whose end is a page that nobody may touch: preload it, and what torch allocates for tensors
// and what the kernels allocate for themselves ends there. AddressSanitizer does not see what
// masked vectors and gathers read or write; the processor does. Memory given back is never used
// again, and new memory is filled with ones, which are NaN.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_malloc(size_t);
extern void* __libc_memalign(size_t, size_t);

#define PAGE ((size_t)4096)
#define SPACE ((size_t)1 << 40)

static char* space;
static atomic_size_t used;

__attribute__((constructor)) static void reserve(void) {
  void* found = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found != MAP_FAILED) space = found;
}

static int from_library(void* caller, const char* name) {
  struct dl_find_object found;
  return space && !_dl_find_object(caller, &found) && strstr(found.dlfo_link_map->l_name, name);
}

// A page that holds the size, the memory, a page that stays closed.
static void* fenced(size_t size, size_t align) {
  const size_t pages = (size + PAGE - 1) / PAGE * PAGE;
  const size_t at = atomic_fetch_add(&used, pages + 2 * PAGE);
  if (at + pages + 2 * PAGE > SPACE) abort();
  char* base = space + at;
  if (mprotect(base, pages + PAGE, PROT_READ | PROT_WRITE)) return NULL;
  *(size_t*)base = pages;
  memset(base + PAGE, 0xff, pages);
  mprotect(base, PAGE, PROT_READ);
  return base + PAGE + (pages - size) / align * align;
}

void free(void* memory) {
  char* at = memory;
  if (!space || at < space || at >= space + SPACE) return __libc_free(memory);
  char* base = space + (size_t)(at - space) / PAGE * PAGE - PAGE;
  const size_t pages = *(size_t*)base;
  mmap(base, pages + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

int posix_memalign(void** result, size_t align, size_t size) {
  // torch may be given tensors anywhere, so nothing but the size of a number counts
  if (size && from_library(__builtin_return_address(0), "libc10"))
    *result = fenced(size, 1);
  else
    *result = __libc_memalign(align, size);
  return *result ? 0 : ENOMEM;
}

void* _Znwm(size_t size) {
  if (size && from_library(__builtin_return_address(0), "_kernels")) return fenced(size, 1);
  void* found = __libc_malloc(size ? size : 1);
  if (!found) abort();
  return found;
}

void* _ZnwmSt11align_val_t(size_t size, size_t align) {
  if (size && from_library(__builtin_return_address(0), "_kernels")) return fenced(size, align);
  void* found = __libc_memalign(align, size ? size : 1);
  if (!found) abort();
  return found;
}
