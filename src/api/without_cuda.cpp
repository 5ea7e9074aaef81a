// SPDX-License-Identifier: Apache-2.0
// The calls on device memory in a library without CUDA: each is refused.
#include "misa/cuda.hpp"

namespace misa::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::unsupported,
              "device memory: expected a library with CUDA backends, got one without");
}

}  // namespace

void top_k(const Logits& /*logits*/, int /*top_k*/, const TopK& /*out*/, void* /*stream*/) {
  refuse();
}

struct Plan::State {};

Plan::Plan(const IndexerConfig& /*config*/, const Shape& /*shape*/,
           const PlanOptions& /*options*/) {
  refuse();
}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

std::size_t Plan::workspace_bytes() const { refuse(); }
std::string_view Plan::backend() const { refuse(); }

void Plan::run(const Queries& /*q*/, const Weights& /*w*/, const RaggedKeys& /*k*/,
               const Selection& /*out*/, std::span<std::byte> /*workspace*/,
               void* /*stream*/) const {
  refuse();
}

void Plan::run(const Queries& /*q*/, const Weights& /*w*/, const PagedKeys& /*k*/,
               const Selection& /*out*/, std::span<std::byte> /*workspace*/,
               void* /*stream*/) const {
  refuse();
}

std::size_t means_workspace_bytes(std::int64_t /*tokens*/, std::int64_t /*dim*/,
                                  std::int64_t /*count*/) {
  refuse();
}

void route_from_means(const Queries& /*q*/, const Weights& /*w*/, const RaggedMeans& /*means*/,
                      int /*heads*/, std::span<std::int32_t> /*out*/,
                      std::span<std::byte> /*workspace*/, void* /*stream*/,
                      std::string_view /*backend*/) {
  refuse();
}

void keep_blocks_from_means(const Queries& /*q*/, const Weights& /*w*/,
                            const RaggedMeans& /*means*/, int /*filter_blocks*/,
                            std::span<std::int32_t> /*out*/, std::span<std::byte> /*workspace*/,
                            void* /*stream*/, std::string_view /*backend*/) {
  refuse();
}

void append(const CacheSpan& /*cache*/, const NewKeys& /*keys*/,
            std::span<const std::int64_t> /*slots*/, void* /*stream*/, ScaleFormat /*format*/) {
  refuse();
}

void append(const CacheSpan& /*cache*/, std::span<const std::int64_t> /*slots*/, void* /*stream*/) {
  refuse();
}

void copy_pages(const CacheView& /*source*/, std::span<const std::int32_t> /*from*/,
                const CacheSpan& /*target*/, std::span<const std::int32_t> /*to*/,
                void* /*stream*/) {
  refuse();
}

void rebuild(const CacheSpan& /*cache*/, std::span<const std::int32_t> /*pages*/,
             std::span<const std::int32_t> /*filled*/, void* /*stream*/) {
  refuse();
}

}  // namespace misa::cuda
