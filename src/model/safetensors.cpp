#include "model/safetensors.h"

#include <simdjson.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

namespace tokenspeed::model {
namespace {

constexpr uint64_t kLengthBytes = 8;
// Of the format; the largest real headers (one tensor per expert, all in one file) stay below a quarter of it.
constexpr uint64_t kHeaderLimit = 100'000'000;
constexpr size_t kMostDimensions = 8;
constexpr std::string_view kMetadata = "__metadata__";

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie in the file");

struct NamedDType {
  std::string_view name;
  DType dtype;
};
constexpr std::array<NamedDType, 7> kDTypes = {{{"F32", DType::kFloat32},
                                                {"F16", DType::kFloat16},
                                                {"BF16", DType::kBFloat16},
                                                {"F8_E4M3", DType::kFloat8E4M3},
                                                {"I32", DType::kInt32},
                                                {"I64", DType::kInt64},
                                                {"U8", DType::kUInt8}}};

// Names come from the file: they are cut before they reach a message.
std::string shown(std::string_view name) {
  constexpr size_t kLongest = 120;
  return "'" + std::string(name.substr(0, kLongest)) + (name.size() > kLongest ? "...'" : "'");
}

class HeaderParser {
 public:
  HeaderParser(std::span<const std::byte> file, const std::string& path) : file_(file), path_(path) {}

  Result<SafetensorsTensors> parse() {
    TS_ASSIGN_OR_RETURN(const std::string_view header, header_text());
    simdjson::dom::parser parser;
    simdjson::dom::element root;
    if (const auto error = parser.parse(header.data(), header.size()).get(root)) {
      return lie("the header is not valid JSON (" + std::string(simdjson::error_message(error)) + ")");
    }
    simdjson::dom::object object;
    if (root.get(object)) return lie("the header is not a JSON object");
    for (const auto [name, value] : object) {
      if (name == kMetadata) {
        TS_RETURN_IF_ERROR(check_metadata(value));
        continue;
      }
      TS_ASSIGN_OR_RETURN(SafetensorsTensor tensor, read_tensor(name, value));
      if (!tensors_.emplace(std::string(name), std::move(tensor)).second) {
        return lie("tensor " + shown(name) + " is there twice");
      }
    }
    TS_RETURN_IF_ERROR(check_tiling());
    return std::move(tensors_);
  }

 private:
  Status lie(const std::string& what) const {
    return data_loss("'" + path_ + "' is not a usable safetensors file: " + what);
  }

  Result<std::string_view> header_text() {
    if (file_.size() < kLengthBytes) {
      return lie("it has " + std::to_string(file_.size()) + " bytes, fewer than the 8 of the header's length");
    }
    uint64_t length = 0;
    std::memcpy(&length, file_.data(), kLengthBytes);
    if (length > kHeaderLimit) {
      return lie("its header claims " + std::to_string(length) + " bytes; at most " + std::to_string(kHeaderLimit) +
                 " are allowed");
    }
    if (length > file_.size() - kLengthBytes) {
      return lie("its header claims " + std::to_string(length) + " bytes, but the file ends after " +
                 std::to_string(file_.size() - kLengthBytes) + " of them; it is truncated");
    }
    const std::string_view text(reinterpret_cast<const char*>(file_.data()) + kLengthBytes, length);
    if (!text.starts_with('{')) return lie("its header does not begin with '{'");
    data_begin_ = kLengthBytes + length;
    return text;
  }

  Status check_metadata(simdjson::dom::element value) const {
    simdjson::dom::object object;
    if (value.get(object)) return lie("__metadata__ is not a JSON object");
    for (const auto [key, text] : object) {
      if (!text.is_string()) return lie("__metadata__ entry " + shown(key) + " is not a string");
    }
    return {};
  }

  Result<SafetensorsTensor> read_tensor(std::string_view name, simdjson::dom::element value) const {
    const std::string tensor_name = "tensor " + shown(name);
    simdjson::dom::object object;
    if (value.get(object)) return lie(tensor_name + " is not described by a JSON object");
    SafetensorsTensor tensor;
    bool has_dtype = false;
    bool has_shape = false;
    bool has_offsets = false;
    for (const auto [key, field] : object) {
      bool* seen = key == "dtype"          ? &has_dtype
                   : key == "shape"        ? &has_shape
                   : key == "data_offsets" ? &has_offsets
                                           : nullptr;
      if (!seen) return lie(tensor_name + " has the unknown field " + shown(key));
      if (std::exchange(*seen, true)) return lie(tensor_name + " has the field " + shown(key) + " twice");
      TS_RETURN_IF_ERROR(key == "dtype"   ? read_dtype(tensor_name, field, tensor)
                         : key == "shape" ? read_shape(tensor_name, field, tensor)
                                          : read_offsets(tensor_name, field, tensor));
    }
    for (const auto& [seen, key] :
         {std::pair{has_dtype, "dtype"}, {has_shape, "shape"}, {has_offsets, "data_offsets"}}) {
      if (!seen) return lie(tensor_name + " has no " + key);
    }
    TS_RETURN_IF_ERROR(check_size(tensor_name, tensor));
    return tensor;
  }

  Status read_dtype(const std::string& tensor_name, simdjson::dom::element field, SafetensorsTensor& tensor) const {
    std::string_view text;
    if (field.get(text)) return lie(tensor_name + "'s dtype is not a string");
    std::string known;
    for (const NamedDType& entry : kDTypes) {
      known += (known.empty() ? "" : ", ") + std::string(entry.name);
      if (entry.name != text) continue;
      tensor.dtype = entry.dtype;
      return {};
    }
    return unimplemented("'" + path_ + "': " + tensor_name + " has dtype " + shown(text) + "; supported are " + known);
  }

  Status read_shape(const std::string& tensor_name, simdjson::dom::element field, SafetensorsTensor& tensor) const {
    simdjson::dom::array dimensions;
    if (field.get(dimensions)) return lie(tensor_name + "'s shape is not a list");
    for (const simdjson::dom::element dimension : dimensions) {
      int64_t extent = 0;
      if (dimension.get(extent) || extent < 0) return lie(tensor_name + "'s shape holds something else than sizes");
      if (tensor.shape.size() == kMostDimensions) {
        return lie(tensor_name + " has more than " + std::to_string(kMostDimensions) + " dimensions");
      }
      tensor.shape.push_back(extent);
    }
    return {};
  }

  Status read_offsets(const std::string& tensor_name, simdjson::dom::element field, SafetensorsTensor& tensor) const {
    simdjson::dom::array offsets;
    uint64_t begin = 0;
    uint64_t end = 0;
    if (field.get(offsets) || offsets.size() != 2 || offsets.at(0).get(begin) || offsets.at(1).get(end)) {
      return lie(tensor_name + "'s data_offsets are not two byte positions");
    }
    const uint64_t data_size = file_.size() - data_begin_;
    if (begin > end) {
      return lie(tensor_name + " ends at byte " + std::to_string(end) + ", before it begins at " +
                 std::to_string(begin));
    }
    if (end > data_size) {
      return lie(tensor_name + " ends at byte " + std::to_string(end) + " of the data, but the file holds " +
                 std::to_string(data_size) + "; it is truncated or its header is wrong");
    }
    tensor.offset = data_begin_ + begin;
    tensor.size = end - begin;
    return {};
  }

  Status check_size(const std::string& tensor_name, const SafetensorsTensor& tensor) const {
    // Extents of 0 count as 1 here, so that no product of any of a tensor's extents can overflow later.
    int64_t bytes = static_cast<int64_t>(dtype_size(tensor.dtype));
    bool overflow = false;
    bool empty = false;
    for (const int64_t extent : tensor.shape) {
      overflow = overflow || __builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes);
      empty = empty || extent == 0;
    }
    if (empty) bytes = 0;
    if (!overflow && static_cast<uint64_t>(bytes) == tensor.size) return {};
    return lie(tensor_name + " has " + std::to_string(tensor.size) + " bytes, but its shape and dtype ask for " +
               (overflow ? std::string("more than a file can hold") : std::to_string(bytes)));
  }

  // Sorted by place, every tensor must begin where the one before it ended, and the last end with the file.
  Status check_tiling() const {
    std::vector<const SafetensorsTensors::value_type*> by_place;
    by_place.reserve(tensors_.size());
    for (const auto& entry : tensors_) by_place.push_back(&entry);
    std::sort(by_place.begin(), by_place.end(), [](const auto* a, const auto* b) {
      return std::pair(a->second.offset, a->second.size) < std::pair(b->second.offset, b->second.size);
    });
    uint64_t end = data_begin_;
    for (const auto* entry : by_place) {
      const auto& [name, tensor] = *entry;
      if (tensor.offset != end) {
        return lie("tensor " + shown(name) + " begins at byte " + std::to_string(tensor.offset - data_begin_) +
                   " of the data, but the one before it ends at " + std::to_string(end - data_begin_) +
                   (tensor.offset < end ? " (they overlap)" : " (nothing describes the bytes between)"));
      }
      end += tensor.size;
    }
    if (end == file_.size()) return {};
    return lie("nothing describes the last " + std::to_string(file_.size() - end) + " bytes of the file");
  }

  const std::span<const std::byte> file_;
  const std::string& path_;
  uint64_t data_begin_ = 0;
  SafetensorsTensors tensors_;
};

}  // namespace

Result<SafetensorsTensors> parse_safetensors(std::span<const std::byte> file, const std::string& path) {
  return HeaderParser(file, path).parse();
}

Result<SafetensorsFile> SafetensorsFile::parse(MappedFile file) {
  TS_ASSIGN_OR_RETURN(SafetensorsTensors tensors, parse_safetensors(file.bytes(), file.path()));
  return SafetensorsFile(std::move(file), std::move(tensors));
}

Result<SafetensorsFile> SafetensorsFile::open(const std::string& path) {
  TS_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  return parse(std::move(file));
}

void SafetensorsFile::read_ahead(ReadAhead how) const {
  const int advice = how == ReadAhead::kWhole ? MADV_WILLNEED : MADV_SEQUENTIAL;
  // Advice only: where the system refuses, reading is merely slower.
  (void)::madvise(const_cast<std::byte*>(file_.bytes().data()), file_.bytes().size(), advice);
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

}  // namespace tokenspeed::model
