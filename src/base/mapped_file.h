// A file mapped read-only into memory, or bytes that are there anyway under a file's name. Move-only; the mapping lives
// as long as the object.
// A file truncated by someone else after mapping raises SIGBUS on access: checkpoints must not be changed while served.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "base/status.h"

namespace tokenspeed {

class MappedFile {
 public:
  MappedFile() = default;
  // Errors: not_found (no such file), failed_precondition (a directory, no permission), internal (mmap failed).
  static Result<MappedFile> open(const std::string& path);
  // Not owned: `bytes` must outlive the object.
  static MappedFile view(std::span<const std::byte> bytes, std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }
  // All of it; invalid_argument over `limit` bytes.
  Result<std::string> text(size_t limit) const;

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  bool owned_ = false;
  std::string path_;
};

// The whole file as a string; refuses files over `limit` bytes (config and tokenizer files are small).
constexpr size_t kTextFileLimit = size_t{256} << 20;
Result<std::string> read_file(const std::string& path, size_t limit = kTextFileLimit);

}  // namespace tokenspeed
