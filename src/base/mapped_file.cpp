#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace tokenspeed {

Result<MappedFile> MappedFile::open(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    std::string message = "cannot open '" + path + "': " + std::strerror(errno);
    return errno == ENOENT ? not_found(std::move(message)) : failed_precondition(std::move(message));
  }
  struct stat info {};
  if (::fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(descriptor);
    return failed_precondition("'" + path + "' is not a regular file");
  }
  MappedFile file;
  file.path_ = path;
  file.size_ = static_cast<size_t>(info.st_size);
  if (file.size_ > 0) {
    void* data = ::mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data == MAP_FAILED) {
      const int error = errno;
      ::close(descriptor);
      file.size_ = 0;
      return internal_error("cannot map '" + path + "' into memory: " + std::strerror(error));
    }
    file.data_ = static_cast<const std::byte*>(data);
    file.owned_ = true;
  }
  ::close(descriptor);
  return file;
}

MappedFile MappedFile::view(std::span<const std::byte> bytes, std::string path) {
  MappedFile file;
  file.data_ = bytes.data();
  file.size_ = bytes.size();
  file.path_ = std::move(path);
  return file;
}

MappedFile::~MappedFile() {
  if (owned_) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      owned_(std::exchange(other.owned_, false)),
      path_(std::move(other.path_)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(owned_, other.owned_);
  std::swap(path_, other.path_);
  return *this;
}

Result<std::string> MappedFile::text(size_t limit) const {
  if (size_ > limit) {
    return invalid_argument("'" + path_ + "' has " + std::to_string(size_) + " bytes; at most " +
                            std::to_string(limit) + " are accepted here");
  }
  return std::string(reinterpret_cast<const char*>(data_), size_);
}

Result<std::string> read_file(const std::string& path, size_t limit) {
  TS_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::open(path));
  return file.text(limit);
}

}  // namespace tokenspeed
