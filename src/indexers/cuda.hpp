// SPDX-License-Identifier: Apache-2.0
// The indexers on a CUDA device: the workspace that a call needs, and the call itself, all in
// device memory.
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
  // For calls of at most this shape. Throws Error if the cap cannot hold a chunk of one query.
  Step(const IndexerConfig& config, const Shape& shape, const KeyBounds& keys,
       std::size_t workspace_cap, const DeviceTraits& device);

  // The smallest workspace cap, in bytes, that holds a chunk of one query.
  static std::size_t least_bytes(const IndexerConfig& config, const Shape& shape,
                                 const KeyBounds& keys, const DeviceTraits& device);

  [[nodiscard]] std::size_t workspace_bytes() const;

  // Enqueues everything on the stream; neither synchronises nor allocates.
  template <class Source>
  void run(const ProblemOf<Source>& problem, const Selection& out, std::byte* workspace,
           void* stream) const;

 private:
  void require_sketch(const DevicePagedSource& keys) const;

  // A pass computes the queries that see `least` to `most` positions, with one config.
  struct Pass {
    IndexerConfig config;
    std::int32_t least;
    std::int32_t most;
    Shape chunk;  // the shape of one chunk of queries
  };

  static std::vector<Pass> passes(const IndexerConfig& config, const Shape& shape);

  std::vector<Pass> passes_;
  KeyBounds keys_;
  DeviceTraits device_;
};

}  // namespace misa::cuda
