// A dump of the driver's form, whole and cut at every length: launches, or none, never a crash.
#include "runtime/cuda/fault_dump.h"

#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

namespace tokenspeed::runtime {
namespace {

// counted_inside: as a header counts sections that are too many for it.
std::vector<std::byte> make_dump(const std::vector<LaunchParameters>& launches, bool counted_inside = false) {
  std::string names(1, '\0');
  std::vector<Elf64_Shdr> sections(1);
  std::string body(sizeof(Elf64_Ehdr), '\0');
  const auto add = [&](const std::string& name, const void* data, size_t size) {
    Elf64_Shdr section = {};
    section.sh_name = static_cast<Elf64_Word>(names.size());
    section.sh_offset = body.size();
    section.sh_size = size;
    names += name + '\0';
    body.append(static_cast<const char*>(data), size);
    sections.push_back(section);
  };
  add(".cudbg.global.0", "memory", 6);
  for (size_t i = 0; i < launches.size(); ++i)
    add(".cudbg.param.dev0.grid" + std::to_string(i), launches[i].data(), launches[i].size() * 8);
  Elf64_Shdr strings = {};
  strings.sh_name = static_cast<Elf64_Word>(names.size());
  names += std::string(".shstrtab") + '\0';
  strings.sh_offset = body.size();
  strings.sh_size = names.size();
  body += names;
  sections.push_back(strings);
  Elf64_Ehdr header = {};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_shoff = body.size();
  header.e_shnum = static_cast<Elf64_Half>(sections.size());
  header.e_shstrndx = static_cast<Elf64_Half>(sections.size() - 1);
  if (counted_inside) {
    header.e_shnum = 0;
    header.e_shstrndx = SHN_XINDEX;
    sections[0].sh_size = sections.size();
    sections[0].sh_link = static_cast<Elf64_Word>(sections.size() - 1);
  }
  std::memcpy(body.data(), &header, sizeof(header));
  body.append(reinterpret_cast<const char*>(sections.data()), sections.size() * sizeof(Elf64_Shdr));
  std::vector<std::byte> dump(body.size());
  std::memcpy(dump.data(), body.data(), body.size());
  return dump;
}

TEST(FaultDump, GivesTheParametersOfEveryLaunch) {
  const std::vector<LaunchParameters> launches = {{1, 0xfedcba9876543210, 3}, {}, {7}};
  EXPECT_EQ(launches_of_dump(make_dump(launches)), launches);
  EXPECT_EQ(launches_of_dump(make_dump(launches, true)), launches);
}

TEST(FaultDump, ReadsNothingBeyondItsEnd) {
  for (const bool counted_inside : {false, true}) {
    const std::vector<std::byte> dump = make_dump({{1, 2, 3}, {4}}, counted_inside);
    for (size_t size = 0; size < dump.size(); ++size) {
      const std::vector<std::byte> cut(dump.begin(), dump.begin() + static_cast<ptrdiff_t>(size));
      EXPECT_LE(launches_of_dump(cut).size(), 2u) << size;
    }
    std::vector<std::byte> bad = dump;
    for (size_t i = 0; i < bad.size(); ++i) {
      const std::byte before = bad[i];
      bad[i] = std::byte{0xff};
      EXPECT_LE(launches_of_dump(bad).size(), dump.size()) << i;
      bad[i] = before;
    }
  }
}

}  // namespace
}  // namespace tokenspeed::runtime
