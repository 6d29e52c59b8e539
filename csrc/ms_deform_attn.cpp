// The operators' schemas. Kernels are registered beside their code, in cpu/ and cuda/; shape inference (fake kernels),
// autograd and the fallback for other devices are registered in piip_core/ops/_library.py.
//
// Everything here uses libtorch's stable ABI only, so a compiled library outlives upgrades of PyTorch.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(piip, m) {
  // value (B, S, M, D), spatial_shapes H0, W0, H1, W1, ..., sampling_locations (B, Q, M, L, P, 2) normalised (x, y),
  // attention_weights (B, Q, M, L, P) -> (B, Q, M * D). Locations and weights are float32, or float64 with float64
  // values.
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  // Gradients of value, sampling_locations and attention_weights. `deterministic`: do not let the order of additions
  // differ from run to run; CPU kernels never do.
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights, bool deterministic=False) -> (Tensor, Tensor, Tensor)");
  // The same with all that comes before the sampling inside, for queries that are the pixels of a grid (Hq, Wq).
  // sampling (B, Hq * Wq, 3 * M * L * P): offsets in pixels of the value map (M, L, P, 2), then logits (M, L, P).
  // Location = ((x + 0.5) / Wq, (y + 0.5) / Hq) + offset / (W, H); weights = softmax of the logits over (L, P).
  // sampling is float32, float16 or bfloat16, whatever value is of these; float64 with float64 values.
  m.def(
      "deform_attn_grid(Tensor value, SymInt[] value_shapes, SymInt[] query_shape, Tensor sampling, int num_points)"
      " -> Tensor");
  // Gradients of value and sampling, in their dtypes.
  m.def(
      "deform_attn_grid_backward(Tensor grad_output, Tensor value, SymInt[] value_shapes, SymInt[] query_shape,"
      " Tensor sampling, int num_points, bool deterministic=False) -> (Tensor, Tensor)");
  // The instruction set the CPU kernels use on this machine; the CUDA runtime version compiled with, 0 without CUDA.
  m.def("cpu_capability() -> str");
  m.def("cuda_version() -> int");
}

#ifndef PIIP_WITH_CUDA
namespace {
int64_t cuda_version() {
  return 0;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(piip, CompositeExplicitAutograd, m) {
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
}
#endif
