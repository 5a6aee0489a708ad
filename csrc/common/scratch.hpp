// Memory that the bindings hold from call to call, on 64-byte boundaries.
#pragma once
#include <cstdint>
#include <vector>

namespace gossamer {

// Room for `count` numbers in `memory`, which grows where it must.
template <class T>
T* aligned(std::vector<T>& memory, int64_t count) {
  const auto wanted = static_cast<size_t>(count) + 64 / sizeof(T);
  if (memory.size() < wanted) memory.resize(wanted);
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<T*>(at + (64 - at % 64) % 64);
}

}  // namespace gossamer
