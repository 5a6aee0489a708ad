// Every operation has one table of functions, which each instruction set fills once, in
// <op>/<set>.cpp. All code of a set lies in anonymous namespaces, so that none of it is linked into
// an older one's.
#pragma once

namespace gossamer {

template <class Kernels>
struct Tables {
  static const Kernels portable, avx2, avx512;
};

}  // namespace gossamer
