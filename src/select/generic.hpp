// The selector for every CUDA device of compute capability 8.0 and above.
#pragma once

#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Arguments as misa::cuda::top_k has them, valid, with rows > 0 and the row stride filled in.
void launch_generic(const Logits& logits, int top_k, const TopK& out, void* stream);

}  // namespace misa::cuda::select
