// Safetensors files: an 8-byte little-endian header length, a JSON header naming each tensor's dtype, shape and byte
// range, then the tensors' bytes. The whole header is checked before anything is used: every range lies in the file,
// the ranges tile the data without overlap or hole, and every size is that of its shape and dtype. Cost: opening maps
// the file and parses the header; tensor bytes are read when touched.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/mapped_file.h"
#include "base/status.h"

namespace tokenspeed::model {

struct SafetensorsTensor {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  uint64_t offset = 0;  // from the file's begin
  uint64_t size = 0;    // bytes
};

using SafetensorsTensors = std::map<std::string, SafetensorsTensor, std::less<>>;

// The header of a file whose bytes are all in `file`; `path` names it in messages. Errors: data_loss for every way in
// which a file can be truncated or lie, unimplemented for a dtype this engine does not read.
Result<SafetensorsTensors> parse_safetensors(std::span<const std::byte> file, const std::string& path);

class SafetensorsFile {
 public:
  // Errors: those of parse_safetensors, and of MappedFile::open.
  static Result<SafetensorsFile> parse(MappedFile file);
  static Result<SafetensorsFile> open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  // By name, in its order.
  const SafetensorsTensors& tensors() const { return tensors_; }
  // Null when there is none of that name.
  const SafetensorsTensor* find(std::string_view name) const;
  // Valid as long as this object. Not necessarily aligned to the dtype.
  const std::byte* data(const SafetensorsTensor& tensor) const { return file_.bytes().data() + tensor.offset; }

  enum class ReadAhead : uint8_t { kWhole, kSequential };
  // Asks the system to begin reading the whole file now, or to read far ahead of whoever reads it. Does not wait.
  void read_ahead(ReadAhead how) const;
  size_t size() const { return file_.bytes().size(); }

 private:
  SafetensorsFile(MappedFile file, SafetensorsTensors tensors) : file_(std::move(file)), tensors_(std::move(tensors)) {}

  MappedFile file_;
  SafetensorsTensors tensors_;
};

}  // namespace tokenspeed::model
