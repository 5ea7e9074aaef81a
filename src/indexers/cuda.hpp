// The indexers on a CUDA device: what a call needs, and the call, all of it in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda {

class Step {
 public:
  // For calls within a shape, of `total_keys` keys at most. Throws Error if the cap cannot hold the
  // smallest slab.
  Step(const IndexerConfig& config, const Shape& shape, std::int64_t total_keys,
       std::size_t workspace_cap, const Device& device);

  // The smallest cap that holds.
  static std::size_t least_bytes(const IndexerConfig& config, const Shape& shape,
                                 std::int64_t total_keys, const Device& device);

  [[nodiscard]] std::size_t workspace_bytes() const;

  // Enqueues everything on the stream; neither synchronises nor allocates.
  void run(const Problem& problem, const Selection& out, std::byte* workspace, void* stream) const;

 private:
  IndexerConfig config_;
  Shape slab_;  // the shape of one slab of queries
  std::int64_t total_keys_;
  Device device_;
};

}  // namespace misa::cuda
