// SPDX-License-Identifier: Apache-2.0
#include "synthetic.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

namespace misa::cli {
namespace {

void fill_normal(std::span<float> values, std::mt19937_64& random, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  std::generate(values.begin(), values.end(), [&] { return normal(random); });
}

void add(std::span<float> to, float factor, std::span<const float> values) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    to[i] += factor * values[i];
  }
}

void negate(std::span<const float> values, std::span<float> to) {
  std::transform(values.begin(), values.end(), to.begin(), std::negate<>());
}

class Random : public Synthetic {
 public:
  explicit Random(const SyntheticShape& shape) : shape_(shape) {}

  void query(std::int64_t t, std::span<float> out) const override {
    auto random = numbers(SyntheticUse::queries, t);
    fill_normal(out, random);
  }
  void weights(std::int64_t t, std::span<float> out) const override {
    auto random = numbers(SyntheticUse::weights, t);
    fill_normal(out, random, 1 / std::sqrt(static_cast<float>(shape_.heads * shape_.dim)));
  }
  void key(std::int64_t s, std::span<float> out) const override {
    auto random = numbers(SyntheticUse::keys, s);
    fill_normal(out, random);
  }

 protected:
  [[nodiscard]] std::mt19937_64 numbers(SyntheticUse use, std::int64_t row) const {
    return synthetic_numbers(shape_.seed, use, row);
  }
  [[nodiscard]] std::vector<std::vector<float>> unit_vectors(std::int64_t count) const {
    auto random = numbers(SyntheticUse::directions, 0);
    std::vector<std::vector<float>> list;
    for (std::int64_t i = 0; i < count; ++i) {
      std::vector<float> direction(static_cast<std::size_t>(shape_.dim));
      fill_normal(direction, random);
      const float norm = std::sqrt(
          std::inner_product(direction.begin(), direction.end(), direction.begin(), 0.0F));
      for (float& value : direction) {
        value /= norm;
      }
      list.push_back(std::move(direction));
    }
    return list;
  }
  // That of a random query or key.
  [[nodiscard]] float norm() const { return std::sqrt(static_cast<float>(shape_.dim)); }
  [[nodiscard]] std::span<float> head(std::span<float> query, std::int64_t j) const {
    return query.subspan(static_cast<std::size_t>(j * shape_.dim), shape_.dim);
  }

  SyntheticShape shape_;
};

// Every key has nearly the same component along one direction. The queries of the first half of the
// heads point along it, so that each head adds nearly the same to every score. Those of the other
// heads point against it, so that their ReLU gives 0, except for one head in kSeekers per query: it
// also points at needles, and its ReLU is positive for those alone.
class Structured : public Random {
 public:
  explicit Structured(const SyntheticShape& shape)
      : Random(shape), directions_(unit_vectors(1 + kNeedleKinds)) {}

  void query(std::int64_t t, std::span<float> out) const override {
    auto random = numbers(SyntheticUse::queries, t);
    constexpr float kNoise = 0.1F;
    fill_normal(out, random, kNoise);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      add(head(out, j), looks_along(j) ? norm() : -norm() * kAgainst, directions_[0]);
      if (seeks(t, j)) {
        add(head(out, j), norm(), directions_[1 + t % kNeedleKinds]);
      }
    }
  }

  void weights(std::int64_t t, std::span<float> out) const override {
    Random::weights(t, out);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      if (seeks(t, j)) {
        out[j] = std::abs(out[j]);
      }
    }
  }

  void key(std::int64_t s, std::span<float> out) const override {
    auto random = numbers(SyntheticUse::keys, s);
    fill_normal(out, random);
    const float along = std::inner_product(out.begin(), out.end(), directions_[0].begin(), 0.0F);
    add(out, kShared + (kSpread - 1) * along, directions_[0]);
    std::uniform_int_distribution<std::int64_t> any(0, kKeysANeedle * kNeedleKinds - 1);
    if (const std::int64_t kind = any(random); kind < kNeedleKinds) {
      add(out, kNeedle, directions_[1 + kind]);
    }
  }

 private:
  static constexpr float kShared =
      8;  // mean of the component, in standard deviations of the others
  static constexpr float kSpread = 0.1F;   // its standard deviation
  static constexpr float kAgainst = 0.5F;  // q . k is -4 on average, with a deviation of about 1
  static constexpr float kNeedle = 8;      // raises q . k to +4 for a needle
  static constexpr std::int64_t kNeedleKinds = 8;
  static constexpr std::int64_t kKeysANeedle = 64;
  static constexpr std::int64_t kSeekers = 8;

  [[nodiscard]] bool looks_along(std::int64_t j) const { return j < shape_.heads / 2; }
  [[nodiscard]] bool seeks(std::int64_t t, std::int64_t j) const {
    return !looks_along(j) && (t + j) % kSeekers == 0;
  }

  std::vector<std::vector<float>> directions_;  // the common one, then one for each kind of needle
};

// kLoudHeads adjacent heads of a query have weights that are kLoud times as large, all of one sign.
// They come in pairs with q and -q, so that a pair adds w |q . k|, of which no linear function says
// anything.
class Concentrated : public Random {
 public:
  using Random::Random;

  void query(std::int64_t t, std::span<float> out) const override {
    Random::query(t, out);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      if (is_loud(t, j) && j % 2 == 1) {
        negate(head(out, j - 1), head(out, j));
      }
    }
  }

  void weights(std::int64_t t, std::span<float> out) const override {
    Random::weights(t, out);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      if (is_loud(t, j)) {
        out[j] = kLoud / std::sqrt(static_cast<float>(shape_.heads * shape_.dim));
      }
    }
  }

 private:
  static constexpr std::int64_t kLoudHeads = 8;
  static constexpr float kLoud = 32;

  [[nodiscard]] bool is_loud(std::int64_t t, std::int64_t j) const {
    return j / kLoudHeads == t % std::max<std::int64_t>(shape_.heads / kLoudHeads, 1);
  }
};

// Passages of kPassage keys have a topic, one of as many as make kTopicKeys keys of each. The first
// quarter of a query's heads point along a topic, with q . k far from 0 there. The others come in
// pairs with q and -q and the same weight, kWithin times as large.
class Passages : public Random {
 public:
  explicit Passages(const SyntheticShape& shape)
      : Random(shape), topics_(unit_vectors(std::max<std::int64_t>(shape.keys / kTopicKeys, 2))) {}

  void query(std::int64_t t, std::span<float> out) const override {
    Random::query(t, out);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      if (sees_topics(j)) {
        add(head(out, j), norm(), topic(t));
      } else if (is_second(j)) {
        negate(head(out, j - 1), head(out, j));
      }
    }
  }

  void weights(std::int64_t t, std::span<float> out) const override {
    Random::weights(t, out);
    for (std::int64_t j = 0; j < shape_.heads; ++j) {
      if (sees_topics(j)) {
        out[j] = std::abs(out[j]);
      } else {
        out[j] = is_second(j) ? out[j - 1] : kWithin * out[j];
      }
    }
  }

  void key(std::int64_t s, std::span<float> out) const override {
    Random::key(s, out);
    add(out, kLift, topic(s % std::max<std::int64_t>(shape_.keys, 1) / kPassage));
  }

 private:
  static constexpr std::int64_t kPassage = 256;
  static constexpr std::int64_t kTopicKeys = 4096;
  static constexpr float kLift = 12;
  static constexpr float kWithin = 3;

  [[nodiscard]] bool sees_topics(std::int64_t j) const { return j < shape_.heads / 4; }
  [[nodiscard]] bool is_second(std::int64_t j) const {
    return j > shape_.heads / 4 && (j - shape_.heads / 4) % 2 == 1;
  }
  [[nodiscard]] std::span<const float> topic(std::int64_t number) const {
    return topics_[static_cast<std::size_t>(number) % topics_.size()];
  }

  std::vector<std::vector<float>> topics_;
};

}  // namespace

std::unique_ptr<const Synthetic> make_synthetic(std::string_view kind,
                                                const SyntheticShape& shape) {
  if (kind == "structured") {
    return std::make_unique<Structured>(shape);
  }
  if (kind == "concentrated") {
    return std::make_unique<Concentrated>(shape);
  }
  if (kind == "passages") {
    return std::make_unique<Passages>(shape);
  }
  return std::make_unique<Random>(shape);
}

std::mt19937_64 synthetic_numbers(std::uint64_t seed, SyntheticUse use, std::int64_t row) {
  const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
  const auto at = static_cast<std::uint64_t>(row);
  std::seed_seq sequence{low(seed), low(seed >> 32), static_cast<std::uint32_t>(use), low(at),
                         low(at >> 32)};
  return std::mt19937_64(sequence);
}

}  // namespace misa::cli
