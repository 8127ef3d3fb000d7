// A directory of the file system and an embedded one look the same to who reads them.
#include "base/directory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace tokenspeed {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

const std::array kFiles = {EmbeddedFile{"config.json", bytes_of("{}")}, EmbeddedFile{"empty", {}}};

class DirectoryTest : public testing::TestWithParam<bool> {
 protected:
  DirectoryTest() {
    std::filesystem::create_directories(path_);
    for (const EmbeddedFile& file : kFiles) {
      std::ofstream(path_ / file.name, std::ios::binary)
          .write(reinterpret_cast<const char*>(file.bytes.data()), static_cast<std::streamsize>(file.bytes.size()));
    }
  }
  ~DirectoryTest() override { std::filesystem::remove_all(path_.parent_path()); }

  Directory directory() const {
    return GetParam() ? Directory::embedded("model", kFiles) : Directory(path_.string() + "/");
  }

  const std::filesystem::path path_ =
      std::filesystem::temp_directory_path() / ("tokenspeed_directory_" + std::to_string(getpid())) / "model";
};

TEST_P(DirectoryTest, GivesItsFiles) {
  const Directory given = directory();
  EXPECT_EQ(given.name(), "model");
  for (const EmbeddedFile& file : kFiles) {
    EXPECT_TRUE(given.has(file.name));
    const auto opened = given.open(file.name);
    ASSERT_TRUE(opened.ok()) << opened.status().to_string();
    ASSERT_EQ(opened->bytes().size(), file.bytes.size());
    EXPECT_EQ(opened->path(), given.path_of(file.name));
    EXPECT_EQ(given.read(file.name)->size(), file.bytes.size());
  }
  EXPECT_EQ(*given.read("config.json"), "{}");
}

TEST_P(DirectoryTest, NamesWhatIsMissingOrTooLarge) {
  const Directory given = directory();
  EXPECT_FALSE(given.has("weights"));
  const Status missing = given.open("weights").status();
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_NE(missing.message().find(given.path_of("weights")), std::string::npos) << missing.message();
  const Status large = given.read("config.json", 1).status();
  EXPECT_EQ(large.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(large.message().find("config.json"), std::string::npos) << large.message();
}

INSTANTIATE_TEST_SUITE_P(Kinds, DirectoryTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Embedded" : "OfTheFileSystem"; });

// A view owns nothing: moving it about and dropping it leaves the bytes.
TEST(MappedFileView, BorrowsItsBytes) {
  std::string text = "bytes that stay";
  {
    MappedFile view = MappedFile::view(bytes_of(text), "somewhere");
    MappedFile moved = std::move(view);
    MappedFile assigned;
    assigned = std::move(moved);
    EXPECT_EQ(assigned.bytes().data(), bytes_of(text).data());
    EXPECT_EQ(*assigned.text(100), text);
  }
  text[0] = 'B';
  EXPECT_EQ(text, "Bytes that stay");
}

}  // namespace
}  // namespace tokenspeed
