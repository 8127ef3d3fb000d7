// A directory of files to read: one of the file system, or one that is embedded in the program. What reads a model
// reads it through this, so that both are the same to it. Copying is cheap; nothing is opened before it is asked for.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

#include "base/mapped_file.h"
#include "base/status.h"

namespace tokenspeed {

struct EmbeddedFile {
  std::string_view name;
  std::span<const std::byte> bytes;
};

class Directory {
 public:
  Directory(std::string path) : path_(std::move(path)) {}  // NOLINT: implicit on purpose, a path names a directory
  // `files` and their bytes are the program's: they are never freed.
  static Directory embedded(const std::string& name, std::span<const EmbeddedFile> files);

  // As messages show it: "models/demo", "embedded:demo".
  const std::string& path() const { return path_; }
  std::string path_of(std::string_view file) const { return path_ + "/" + std::string(file); }
  // The last component, of the absolute path: "demo".
  std::string name() const;

  bool has(std::string_view file) const;
  // Errors: those of MappedFile::open.
  Result<MappedFile> open(std::string_view file) const;
  // The whole file; refuses files over `limit` bytes.
  Result<std::string> read(std::string_view file, size_t limit = kTextFileLimit) const;

 private:
  const EmbeddedFile* find(std::string_view file) const;

  std::string path_;
  bool embedded_ = false;
  std::span<const EmbeddedFile> files_;
};

}  // namespace tokenspeed
