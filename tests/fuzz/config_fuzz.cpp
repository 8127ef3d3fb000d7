// Any bytes as config.json: what is accepted must be a configuration that a graph can be built from.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/architecture.h"
#include "model/config.h"
#include "model/tensor_list.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config =
      tokenspeed::model::parse_config(std::string_view(reinterpret_cast<const char*>(data), size), "fuzz");
  if (!config.ok()) {
    require(!config.status().message().empty());
    return 0;
  }
  const auto graph = tokenspeed::model::build_graph(*config);
  require(graph.ok());
  int64_t total = 0;
  for (const auto& tensor : tokenspeed::model::list_tensors(*graph)) {
    int64_t elements = 0;
    require(tensor.rows > 0 && tensor.columns > 0 && tensor.count > 0);
    require(!__builtin_mul_overflow(tensor.elements(), tensor.count * int64_t{sizeof(float)}, &elements));
    require(!__builtin_add_overflow(total, elements, &total));
  }
  return 0;
}
