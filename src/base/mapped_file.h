// A file mapped read-only into memory. Move-only; the mapping lives as long as the object.
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
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  std::string path_;
};

// The whole file as a string; refuses files over `limit` bytes (config and tokenizer files are small).
Result<std::string> read_file(const std::string& path, size_t limit = size_t{256} << 20);

}  // namespace tokenspeed
