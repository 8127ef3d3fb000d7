#include "runtime/cuda/fault_dump.h"

#include <elf.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>

#include "base/mapped_file.h"

namespace tokenspeed::runtime {
namespace {

constexpr std::string_view kParameterSection = ".cudbg.param.";
bool armed = false;
// Settings of the driver, which it reads when it is first used.
constexpr const char* kEnable = "CUDA_ENABLE_COREDUMP_ON_EXCEPTION";
constexpr const char* kFile = "CUDA_COREDUMP_FILE";
constexpr const char* kContents =
    "skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory,skip_abort";

// The driver's %p is the process number.
std::string dump_path(const std::string& process) {
  std::error_code error;
  std::filesystem::path directory = std::filesystem::temp_directory_path(error);
  if (error) directory = "/tmp";
  return directory / ("tokenspeed-gpu-fault-" + process);
}

template <typename T>
bool read_at(std::span<const std::byte> bytes, uint64_t offset, T* value) {
  if (offset > bytes.size() || bytes.size() - offset < sizeof(T)) return false;
  std::memcpy(value, bytes.data() + offset, sizeof(T));
  return true;
}

// The table of a dump's sections, which the driver writes last.
class Sections {
 public:
  explicit Sections(std::span<const std::byte> dump) : dump_(dump) {
    if (!read_at(dump, 0, &header_) || std::memcmp(header_.e_ident, ELFMAG, SELFMAG) != 0) header_ = {};
    Elf64_Shdr first;
    if (!at(0, &first)) return;
    // A dump of many warps has more sections than the header can count: the first section does.
    count_ = header_.e_shnum == 0 ? first.sh_size : header_.e_shnum;
    names_ = header_.e_shstrndx == SHN_XINDEX ? first.sh_link : header_.e_shstrndx;
  }
  uint64_t count() const { return count_; }
  uint64_t names() const { return names_; }
  bool at(uint64_t index, Elf64_Shdr* section) const {
    return header_.e_shoff > 0 && header_.e_shoff <= dump_.size() &&
           index < (dump_.size() - header_.e_shoff) / sizeof(Elf64_Shdr) &&
           read_at(dump_, header_.e_shoff + index * sizeof(Elf64_Shdr), section);
  }

 private:
  std::span<const std::byte> dump_;
  Elf64_Ehdr header_ = {};
  uint64_t count_ = 0;
  uint64_t names_ = 0;
};

std::span<const std::byte> content(std::span<const std::byte> file, const Elf64_Shdr& section) {
  if (section.sh_offset > file.size() || file.size() - section.sh_offset < section.sh_size) return {};
  return file.subspan(section.sh_offset, section.sh_size);
}

}  // namespace

void arm_fault_dump() {
  const std::string path = dump_path("%p");
  const char* const file = std::getenv(kFile);
  if (std::getenv(kEnable) && (file == nullptr || file != path)) return;  // the user's own
  armed = setenv("CUDA_ENABLE_LIGHTWEIGHT_COREDUMP", "1", 1) == 0 &&
          setenv("CUDA_COREDUMP_GENERATION_FLAGS", kContents, 1) == 0 && setenv(kFile, path.c_str(), 1) == 0 &&
          setenv(kEnable, "1", 1) == 0;
}

std::vector<LaunchParameters> launches_of_dump(std::span<const std::byte> dump) {
  std::vector<LaunchParameters> launches;
  const Sections sections(dump);
  Elf64_Shdr section;
  if (!sections.at(sections.names(), &section)) return launches;
  const std::span<const std::byte> names = content(dump, section);
  for (uint64_t i = 0; i < sections.count(); ++i) {
    if (!sections.at(i, &section)) break;
    if (section.sh_name >= names.size()) continue;
    const std::string_view rest(reinterpret_cast<const char*>(names.data()) + section.sh_name,
                                names.size() - section.sh_name);
    if (!rest.starts_with(kParameterSection)) continue;
    const std::span<const std::byte> bytes = content(dump, section);
    LaunchParameters words(bytes.size() / sizeof(uint64_t));
    if (!words.empty()) std::memcpy(words.data(), bytes.data(), words.size() * sizeof(uint64_t));
    launches.push_back(std::move(words));
  }
  return launches;
}

std::vector<LaunchParameters> take_faulted_launches() {
  if (!armed) return {};
  const std::string path = dump_path(std::to_string(getpid()));
  std::vector<LaunchParameters> launches;
  if (const auto file = MappedFile::open(path); file.ok()) launches = launches_of_dump(file->bytes());
  std::error_code none;
  std::filesystem::remove(path, none);
  return launches;
}

}  // namespace tokenspeed::runtime
