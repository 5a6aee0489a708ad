// A vector as wide as the registers are. A wider one (batch_tiles.hpp) serves for turning, but sums
// held in it go through memory where registers are narrower. The including file defines kLanes.
#pragma once

namespace gossamer {
namespace {

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

}  // namespace
}  // namespace gossamer
