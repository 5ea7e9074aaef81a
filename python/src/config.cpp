// SPDX-License-Identifier: Apache-2.0
// The names of indexers and routers, and the fields of misa.Config.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "core/notation.hpp"
#include "core/recipe.hpp"
#include "core/sketch.hpp"

namespace misa::python {

namespace nb = nanobind;

namespace {

std::vector<std::string_view> list_of(std::span<const std::string_view> names) {
  return {names.begin(), names.end()};
}

template <class T>
T field(nb::handle config, const char* name) {
  return nb::cast<T>(config.attr(name));
}

// The fields of misa.Config except top_k.
nb::dict fields_of(const IndexerConfig& config) {
  nb::dict fields;
  fields["router"] = name_of(config.router);
  fields["heads"] = config.heads;
  fields["block"] = config.block;
  fields["residual"] = config.residual;
  fields["filter_block"] = config.filter_block;
  fields["filter_blocks"] = config.filter_blocks;
  fields["candidates"] = config.candidates;
  fields["sketch"] = config.sketch;
  fields["dense_work"] = config.dense_work;
  fields["ordered"] = config.ordered;
  fields["static_heads"] = nb::tuple(nb::cast(config.static_heads));
  return fields;
}

// The named indexer; with a sketch, unless it has 0 bits, and the candidates for it.
IndexerConfig usual(std::string_view name, int top_k, int sketch) {
  IndexerConfig config = indexer_by_name(name, top_k);
  if (sketch != 0) {
    config.candidates = IndexerConfig::candidates_of_sketch(sketch, top_k);
  }
  return config;
}

std::string_view name_of(RouterKeys keys) {
  switch (keys) {
    case RouterKeys::none: break;
    case RouterKeys::block_means: return "block means";
    case RouterKeys::sampled: return "sampled";
    case RouterKeys::last: return "last";
  }
  return "none";
}

}  // namespace

IndexerConfig config_of(nb::handle config) {
  IndexerConfig chosen;
  chosen.top_k = field<int>(config, "top_k");
  chosen.router = router_by_name(field<std::string_view>(config, "router"));
  chosen.heads = field<int>(config, "heads");
  chosen.block = field<int>(config, "block");
  chosen.residual = field<bool>(config, "residual");
  chosen.filter_block = field<int>(config, "filter_block");
  chosen.filter_blocks = field<int>(config, "filter_blocks");
  chosen.candidates = field<int>(config, "candidates");
  chosen.sketch = field<int>(config, "sketch");
  chosen.dense_work = field<std::int64_t>(config, "dense_work");
  chosen.ordered = field<bool>(config, "ordered");
  chosen.static_heads = field<std::vector<std::int32_t>>(config, "static_heads");
  return chosen;
}

void bind_config(nb::module_& module) {
  module.def(
      "defaults",
      [](std::string_view name, int top_k, int sketch) {
        return fields_of(usual(name, top_k, sketch));
      },
      nb::arg("indexer"), nb::arg("top_k"), nb::arg("sketch"),
      "The fields of a named indexer except top_k, with the candidates of a sketch if its bits are "
      "not 0; ValueError if there is none of that name.");
  module.def(
      "indexer_of_notation",
      [](std::string_view text, int top_k) {
        const NotedIndexer indexer = indexer_of_notation(text, top_k);
        const nb::dict others = fields_of(usual(indexer.name, top_k, indexer.config.sketch));
        nb::dict fields;
        for (const auto& [field, value] : fields_of(indexer.config)) {
          if (!value.equal(others[field])) {
            fields[field] = value;
          }
        }
        return nb::make_tuple(indexer.name, fields);
      },
      nb::arg("text"), nb::arg("top_k"),
      "The name of an indexer written as misa-r:h=3:m=2k, and the fields that are not its usual "
      "ones; ValueError for an unknown name, setting or value.");
  module.def(
      "check_router", [](std::string_view name) { router_by_name(name); }, nb::arg("router"),
      "ValueError if there is no router of that name.");
  module.def(
      "effective_config",
      [](nb::handle config, std::int64_t heads) {
        return fields_of(effective_config(config_of(config), heads));
      },
      nb::arg("config"), nb::arg("heads"),
      "The fields, except top_k, that decide what a config computes for H heads: its own, or those "
      "of a config without routing if it routes every head.");
  module.def(
      "dense_keys",
      [](nb::handle config, std::int64_t heads) { return dense_keys(config_of(config), heads); },
      nb::arg("config"), nb::arg("heads"), "Rows of at most this many keys use DSA.");
  module.def(
      "recipe",
      [](nb::handle config, std::int64_t heads, std::int64_t n) {
        const Recipe recipe = recipe_of(config_of(config), heads, n);
        nb::dict fields;
        fields["dense"] = recipe.dense;
        fields["routed"] = recipe.routed;
        fields["sampled"] = recipe.sampled;
        fields["filtered"] = recipe.filtered;
        fields["active"] = recipe.active;
        fields["residual"] = recipe.residual;
        fields["sketched"] = recipe.sketched;
        fields["reranked"] = recipe.reranked;
        fields["heads"] = recipe.heads;
        fields["scored"] = recipe.scored;
        fields["keep"] = recipe.keep;
        return fields;
      },
      nb::arg("config"), nb::arg("heads"), nb::arg("n"),
      "What a config means for a row of n keys and H heads (core/recipe.hpp).");
  module.def(
      "sketch_key",
      [](int sketch, nb::bytes elements, float scale) {
        const auto dim = static_cast<std::int64_t>(elements.size());
        std::string codes(static_cast<std::size_t>(sketch_code_bytes(sketch, dim)), '\0');
        std::string scales(static_cast<std::size_t>(sketch_scale_bytes(sketch, dim)), '\0');
        encode_sketch(sketch, static_cast<const std::uint8_t*>(elements.data()), scale, dim,
                      reinterpret_cast<std::uint8_t*>(codes.data()),
                      reinterpret_cast<std::uint8_t*>(scales.data()));
        return nb::make_tuple(nb::bytes(codes.data(), codes.size()),
                              nb::bytes(scales.data(), scales.size()));
      },
      nb::arg("sketch"), nb::arg("elements"), nb::arg("scale"),
      "The codes and the scales of a key's sketch of 2 or 4 bits an element (core/sketch.hpp); the "
      "key has 64 or 128 e4m3 elements.");
  module.def(
      "router_keys",
      [](std::string_view name) { return name_of(traits_of(router_by_name(name)).keys); },
      nb::arg("router"), "The keys that a router reads: none, sampled, last, or block means.");
  module.def("sample_stride", &sample_stride, nb::arg("n"),
             "The distance between sampled positions for a query that sees n keys.");
  module.def(
      "indexer_names", [] { return list_of(indexer_names()); }, "Names of the indexers.");
  module.def(
      "router_names", [] { return list_of(router_names()); }, "Names of the routers.");
}

}  // namespace misa::python
