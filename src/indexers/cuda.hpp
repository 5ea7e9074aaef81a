// SPDX-License-Identifier: Apache-2.0
// The indexers on a CUDA device: what a call needs, and the call, all of it in device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda {

class Step {
 public:
  // For calls within a shape, of `total_keys` keys at most. Throws Error if the cap cannot hold the
  // smallest chunk of queries.
  Step(const IndexerConfig& config, const Shape& shape, std::int64_t total_keys,
       std::size_t workspace_cap, const DeviceTraits& device);

  // The smallest cap that holds.
  static std::size_t least_bytes(const IndexerConfig& config, const Shape& shape,
                                 std::int64_t total_keys, const DeviceTraits& device);

  [[nodiscard]] std::size_t workspace_bytes() const;

  // Enqueues everything on the stream; neither synchronises nor allocates.
  void run(const Problem& problem, const Selection& out, std::byte* workspace, void* stream) const;

 private:
  // The queries that see `least` to `most` positions, by one config.
  struct Pass {
    IndexerConfig config;
    std::int32_t least;
    std::int32_t most;
    Shape chunk;  // the shape of one chunk of queries
  };

  static std::vector<Pass> passes(const IndexerConfig& config, const Shape& shape);

  std::vector<Pass> passes_;
  std::int64_t total_keys_;
  DeviceTraits device_;
};

}  // namespace misa::cuda
