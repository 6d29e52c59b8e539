// Runs CUDA kernels on the CPU, as far as the tests need it: a warp at a time, its 32 threads as coroutines that change
// places at shuffles. A thread that misses a shuffle of its warp is an error here, where a GPU would hang or go wrong.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__

struct Index {
  unsigned x, y;
};
inline Index threadIdx, blockIdx, gridDim;

namespace piip::cuda {
inline double scratch[48 * 1024 / sizeof(double)];  // shared memory, declared in the kernels
}

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

template <typename T>
void atomicAdd(T* to, T x) {
  *to += x;
}
template <typename T>
void atomicMax(T* to, T x) {
  *to = x > *to ? x : *to;
}

namespace emulator {

constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool done;
  unsigned shuffles;
};
inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int current;
inline double posted[kLanes];
inline std::function<void()> body;

inline void give_way() {
  swapcontext(&lanes[current].context, &scheduler);
}

inline void start() {
  body();
  lanes[current].done = true;
}

// All lanes go from shuffle to shuffle together.
inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    lane.done = false;
    lane.shuffles = 0;
    makecontext(&lane.context, start, 0);
  }
  for (bool running = true; running;) {
    for (current = 0; current < kLanes; ++current) {
      if (!lanes[current].done) {
        threadIdx = {first_thread + current, 0};
        swapcontext(&scheduler, &lanes[current].context);
      }
    }
    running = !lanes[0].done;
    for (const Lane& lane : lanes) {
      if (lane.done != lanes[0].done || lane.shuffles != lanes[0].shuffles) {
        throw std::runtime_error("threads of a warp do not meet at a shuffle");
      }
    }
  }
}

template <typename Kernel>
void launch(Index grid, unsigned threads, const Kernel& kernel) {
  body = kernel;
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (double& number : piip::cuda::scratch) {
        number = NAN;
      }
      for (unsigned thread = 0; thread < threads; thread += kLanes) {
        run_warp(thread);
      }
    }
  }
}

}  // namespace emulator

template <typename T>
T __shfl_down_sync(unsigned, T x, int offset) {
  using namespace emulator;
  static_assert(sizeof(T) <= sizeof(double));
  const int me = current;
  memcpy(&posted[me], &x, sizeof x);
  ++lanes[me].shuffles;
  give_way();
  T other = x;
  if (me + offset < kLanes) {
    memcpy(&other, &posted[me + offset], sizeof other);
  }
  ++lanes[me].shuffles;
  give_way();
  return other;
}
