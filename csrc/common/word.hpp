// 64 columns of a bitmap. Files put bitmaps at any byte, and some processors, and vectors that a
// compiler makes of loops, stumble over a word that is not where words belong. Not to be deduced:
// `auto` and template arguments lose what is said here.
#pragma once
#include <cstdint>

namespace gossamer {

typedef uint64_t Word __attribute__((aligned(1), may_alias));

}  // namespace gossamer
