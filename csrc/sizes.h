// The sizes of a call, as kernels and host know them.
#pragma once

#include <cstdint>

namespace piip {

struct Sizes {
  int64_t batch;
  int64_t values;  // S, all levels together
  int64_t heads;
  int64_t width;  // D, channels per head
  int64_t queries;
  int64_t levels;
  int64_t points;
};

}  // namespace piip
