#include "base/directory.h"

#include <algorithm>
#include <filesystem>

namespace tokenspeed {
namespace {

constexpr std::string_view kScheme = "embedded:";

}  // namespace

Directory Directory::embedded(const std::string& name, std::span<const EmbeddedFile> files) {
  Directory directory(std::string(kScheme) + name);
  directory.embedded_ = true;
  directory.files_ = files;
  return directory;
}

std::string Directory::name() const {
  if (embedded_) return path_.substr(kScheme.size());
  std::error_code error;
  const std::filesystem::path path = std::filesystem::weakly_canonical(path_, error);
  return error || path.filename().empty() ? path_ : path.filename().string();
}

const EmbeddedFile* Directory::find(std::string_view file) const {
  const auto found = std::find_if(files_.begin(), files_.end(), [&](const auto& one) { return one.name == file; });
  return found == files_.end() ? nullptr : &*found;
}

bool Directory::has(std::string_view file) const {
  std::error_code error;
  return embedded_ ? find(file) != nullptr : std::filesystem::exists(path_of(file), error);
}

Result<MappedFile> Directory::open(std::string_view file) const {
  if (!embedded_) return MappedFile::open(path_of(file));
  const EmbeddedFile* found = find(file);
  if (!found) return not_found("there is no '" + path_of(file) + "'");
  return MappedFile::view(found->bytes, path_of(file));
}

Result<std::string> Directory::read(std::string_view file, size_t limit) const {
  TS_ASSIGN_OR_RETURN(const MappedFile opened, open(file));
  return opened.text(limit);
}

}  // namespace tokenspeed
