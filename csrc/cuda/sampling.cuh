// Where samples lie and how much they weigh. The two forms of the operator differ only in this: the general one reads
// locations and attention weights, the fused one offsets and logits of queries that are the pixels of a grid.
#pragma once

#include <cstdint>

#include "sizes.h"

namespace piip::cuda {

constexpr int kMaxLevels = 32;  // the levels travel in the kernels' arguments

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

struct Levels {
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int64_t start[kMaxLevels];
};

// One sample: the offsets of its four corners in elements from the first channel of the head in the image's first
// row, -1 where outside the map, and the position within the pixel. I is wide enough for every offset in an image.
template <typename A, typename I>
struct Sample {
  I corner[4];
  A fx, fy;

  // x and y in pixels, pixel centres at integers. NaN is outside.
  __device__ __forceinline__ Sample(A x, A y, int32_t height, int32_t width, int64_t start, int64_t stride) {
    const bool inside = x > A(-1) && y > A(-1) && x < width && y < height;
    x = inside ? x : A(0);
    y = inside ? y : A(0);
    const A left = floor(x), top = floor(y);
    const int32_t column = static_cast<int32_t>(left), line = static_cast<int32_t>(top);
    fx = x - left;
    fy = y - top;
    const I down = static_cast<I>(width * stride), right = static_cast<I>(stride);
    const I first = static_cast<I>(start + static_cast<int64_t>(line) * width + column) * right;
    const bool has_left = inside && column >= 0, has_right = inside && column + 1 < width;
    const bool has_top = line >= 0, has_bottom = line + 1 < height;
    corner[0] = has_top && has_left ? first : I(-1);
    corner[1] = has_top && has_right ? first + right : I(-1);
    corner[2] = has_bottom && has_left ? first + down : I(-1);
    corner[3] = has_bottom && has_right ? first + down + right : I(-1);
  }

  __device__ __forceinline__ void factors(A weight, A (&factor)[4]) const {
    factor[0] = weight * (1 - fy) * (1 - fx);
    factor[1] = weight * (1 - fy) * fx;
    factor[2] = weight * fy * (1 - fx);
    factor[3] = weight * fy * fx;
  }
};

// The general form: normalised locations (B, Q, M, L, P, 2) and attention weights (B, Q, M, L, P).
template <typename A>
struct Locations {
  const A* locations;
  const A* weights;
  A* grad_locations;  // these two in backward only
  A* grad_weights;

  // The samples of one query and head.
  struct Item {
    const Locations& source;
    const int64_t first;

    __device__ Item(const Locations& source_, const Sizes& s, int64_t image, int64_t query, int64_t head)
        : source(source_), first(((image * s.queries + query) * s.heads + head) * s.levels * s.points) {}

    __device__ __forceinline__ A weight(int index) const {
      return source.weights[first + index];
    }

    __device__ __forceinline__ void position(int index, int32_t height, int32_t width, A& x, A& y) const {
      x = source.locations[2 * (first + index)] * width - A(0.5);
      y = source.locations[2 * (first + index) + 1] * height - A(0.5);
    }

    // Takes the gradients of one sample: of its position in pixels and of its weight.
    __device__ __forceinline__ void write(
        int index, int32_t height, int32_t width, A grad_x, A grad_y, A grad_weight, A*) const {
      source.grad_locations[2 * (first + index)] = grad_x * width;
      source.grad_locations[2 * (first + index) + 1] = grad_y * height;
      source.grad_weights[first + index] = grad_weight;
    }

    __device__ __forceinline__ void finish(int, const A*) const {}
  };

  static constexpr bool kFused = false;
};

// The fused form: the output (B, Q, 3 * M * L * P) of one linear layer, offsets in pixels (M, L, P, 2), then logits
// (M, L, P). Queries are the pixels of a grid `columns` wide and `lines` high.
template <typename A, typename S>
struct GridOffsets {
  const S* sampling;
  S* grad_sampling;  // in backward only
  int32_t lines, columns;

  struct Item {
    const S* offsets;
    const S* logits;
    S* grad_offsets;
    S* grad_logits;
    A x, y;  // the query's own place, between 0 and 1
    A largest, scale;

    __device__ Item(const GridOffsets& source, const Sizes& s, int64_t image, int64_t query, int64_t head) {
      const int samples = static_cast<int>(s.levels * s.points);
      const int64_t row = (image * s.queries + query) * 3 * s.heads * samples;
      const int64_t offset = row + 2 * head * samples, logit = row + (2 * s.heads + head) * samples;
      offsets = source.sampling + offset;
      logits = source.sampling + logit;
      grad_offsets = source.grad_sampling + offset;
      grad_logits = source.grad_sampling + logit;
      const int32_t line = static_cast<int32_t>(query) / source.columns;
      x = (static_cast<int32_t>(query) - line * source.columns + A(0.5)) / source.columns;
      y = (line + A(0.5)) / source.lines;
      largest = -INFINITY;
      for (int index = 0; index < samples; ++index) {
        const A logit_value = static_cast<A>(logits[index]);
        largest = logit_value > largest ? logit_value : largest;
      }
      A sum = 0;
      for (int index = 0; index < samples; ++index) {
        sum += exp(static_cast<A>(logits[index]) - largest);
      }
      scale = 1 / sum;
    }

    __device__ __forceinline__ A weight(int index) const {
      return exp(static_cast<A>(logits[index]) - largest) * scale;
    }

    __device__ __forceinline__ void position(
        int index, int32_t height, int32_t width, A& pixel_x, A& pixel_y) const {
      pixel_x = x * width + static_cast<A>(offsets[2 * index]) - A(0.5);
      pixel_y = y * height + static_cast<A>(offsets[2 * index + 1]) - A(0.5);
    }

    // The gradient of a logit needs those of all weights, so they wait in `kept`.
    __device__ __forceinline__ void write(
        int index, int32_t, int32_t, A grad_x, A grad_y, A grad_weight, A* kept) const {
      grad_offsets[2 * index] = static_cast<S>(grad_x);
      grad_offsets[2 * index + 1] = static_cast<S>(grad_y);
      kept[index] = grad_weight;
    }

    __device__ __forceinline__ void finish(int samples, const A* kept) const {
      A mean = 0;
      for (int index = 0; index < samples; ++index) {
        mean += weight(index) * kept[index];
      }
      for (int index = 0; index < samples; ++index) {
        grad_logits[index] = static_cast<S>(weight(index) * (kept[index] - mean));
      }
    }
  };

  static constexpr bool kFused = true;
};

}  // namespace piip::cuda
