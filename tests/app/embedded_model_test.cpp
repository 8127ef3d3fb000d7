// The demo model inside the program: the repository's files, and enough to run from anywhere.
#include "app/embedded_model.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace tokenspeed::app {
namespace {

namespace fs = std::filesystem;

const fs::path kDemo = fs::path(TOKENSPEED_SOURCE_DIR) / "models" / "demo";

TEST(EmbeddedModel, HoldsTheRepositorysFiles) {
  const Directory* embedded = embedded_model(kEmbeddedModel);
  ASSERT_NE(embedded, nullptr);
  for (const auto& entry : fs::directory_iterator(kDemo)) {
    const std::string name = entry.path().filename().string();
    if (name == "README.md") continue;
    const auto there = MappedFile::open(entry.path().string());
    const auto here = embedded->open(name);
    ASSERT_TRUE(here.ok()) << here.status().message();
    EXPECT_TRUE(std::ranges::equal(here->bytes(), there->bytes())) << name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(here->bytes().data()) % 64, 0u) << name;
  }
}

TEST(EmbeddedModel, OnlyItsOwnNameMeansIt) {
  EXPECT_EQ(embedded_model("./demo"), nullptr);
  EXPECT_EQ(embedded_model(""), nullptr);
  EXPECT_EQ(model_directory("./demo").path(), "./demo");
  const auto config = load_model_config(kEmbeddedModel);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->name, "demo");
  EXPECT_TRUE(load_model_config("qwen3.5-0.8b").ok());
}

// The program alone in an empty directory, under another name.
TEST(EmbeddedModel, DemoRunsFromAnywhere) {
  const fs::path home = fs::temp_directory_path() / ("tokenspeed_elsewhere_" + std::to_string(getpid()));
  fs::create_directories(home / "demo");  // not the model
  fs::copy_file(TOKENSPEED_PROGRAM, home / "program");
  const std::string command = "cd " + home.string() + " && ./program demo --exit --port 0 >output 2>&1";
  const int status = std::system(command.c_str());
  std::ifstream file(home / "output");
  const std::string output{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(status, 0) << output;
  for (const char* part : {"calculate", "3798", "tok/s"}) EXPECT_NE(output.find(part), std::string::npos) << output;
  fs::remove_all(home);
}

}  // namespace
}  // namespace tokenspeed::app
