// Any bytes as a safetensors file: what parses must lie in the file, tile it and have the sizes of its shapes.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>

#include "model/safetensors.h"

namespace {

using tokenspeed::model::SafetensorsTensor;

void require(bool condition) {
  if (!condition) std::abort();
}

uint64_t bytes_of_shape(const SafetensorsTensor& tensor) {
  uint64_t bytes = tokenspeed::dtype_size(tensor.dtype);
  for (const int64_t extent : tensor.shape) {
    require(extent >= 0);
    bytes *= static_cast<uint64_t>(extent);
  }
  return bytes;
}

void check(const std::string& file) {
  const auto tensors =
      tokenspeed::model::parse_safetensors({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "fuzz");
  if (!tensors.ok()) {
    require(!tensors.status().message().empty());
    return;
  }
  uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof(header));
  uint64_t total = sizeof(header) + header;
  for (const auto& [name, tensor] : *tensors) {
    require(tensor.offset >= sizeof(header) + header && tensor.offset + tensor.size <= file.size());
    require(bytes_of_shape(tensor) == tensor.size);
    total += tensor.size;
  }
  require(total == file.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string file(reinterpret_cast<const char*>(data), size);
  check(file);
  // Again with a length that reaches to the last '}', which mutations of the length rarely hit.
  const size_t end = file.rfind('}');
  if (end == std::string::npos || end < sizeof(uint64_t)) return 0;
  const uint64_t length = end + 1 - sizeof(uint64_t);
  std::memcpy(file.data(), &length, sizeof(length));
  check(file);
  return 0;
}
