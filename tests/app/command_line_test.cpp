// The program as a user runs it: its commands, what they print, and how they fail.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;

const std::string kRoot = TOKENSPEED_SOURCE_DIR;
const std::string kDemo = kRoot + "/models/demo";

struct Outcome {
  int exit_code = -1;
  std::string output;
};

// Runs the program with `input` on stdin; stderr is part of the output when asked for.
Outcome run(const std::string& arguments, const std::string& input = "", bool with_stderr = false) {
  const auto file = std::filesystem::temp_directory_path() / ("tokenspeed_command_line_" + std::to_string(getpid()));
  std::ofstream(file, std::ios::binary) << input;
  const std::string command =
      TOKENSPEED_PROGRAM " " + arguments + " <" + file.string() + (with_stderr ? " 2>&1" : " 2>/dev/null");
  Outcome outcome;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return outcome;
  std::array<char, 65536> piece;
  for (size_t n; (n = fread(piece.data(), 1, piece.size(), pipe)) > 0;) outcome.output.append(piece.data(), n);
  outcome.exit_code = WEXITSTATUS(pclose(pipe));
  std::filesystem::remove(file);
  return outcome;
}

std::vector<Json> lines_of(const std::string& text) {
  std::vector<Json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(Json::parse(line));
  return lines;
}

Json read_json(const std::string& path) { return Json::parse(std::ifstream(path)); }

TEST(CommandLine, TokenizeEqualsTheGoldensBothWays) {
  const Json goldens = read_json(kRoot + "/tests/goldens/demo-tokenizer.json");
  std::string texts;
  std::string ids;
  for (const Json& golden : goldens) {
    texts += golden["text"].dump() + "\n";
    ids += golden["ids"].dump() + "\n";
  }
  const Outcome encoded = run("tokenize " + kDemo + " --jsonl", texts);
  const Outcome decoded = run("tokenize " + kDemo + " --jsonl --decode", ids);
  ASSERT_EQ(encoded.exit_code, 0);
  ASSERT_EQ(decoded.exit_code, 0);
  const auto encoded_lines = lines_of(encoded.output);
  const auto decoded_lines = lines_of(decoded.output);
  ASSERT_EQ(encoded_lines.size(), goldens.size());
  ASSERT_EQ(decoded_lines.size(), goldens.size());
  for (size_t i = 0; i < goldens.size(); ++i) {
    EXPECT_EQ(encoded_lines[i], goldens[i]["ids"]) << goldens[i]["text"];
    EXPECT_EQ(decoded_lines[i], goldens[i].value("decoded", goldens[i]["text"].get<std::string>()));
  }
}

// With a GPU it measures it; without one, or in a build without CUDA, it says what is missing and what to do.
TEST(CommandLine, AGpuIsUsedOrItsAbsenceExplained) {
  const Outcome outcome = run("bench membw --device cuda", "", true);
  if (outcome.exit_code == 0) {
    EXPECT_NE(outcome.output.find("read_bandwidth_gb_s"), std::string::npos) << outcome.output;
  } else {
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_NE(outcome.output.find("run with --device cpu"), std::string::npos) << outcome.output;
  }
}

TEST(CommandLine, TokenizeTakesPlainText) {
  const Outcome encoded = run("tokenize " + kDemo, "Hello, world");
  ASSERT_EQ(encoded.exit_code, 0);
  EXPECT_EQ(run("tokenize " + kDemo + " --decode", encoded.output).output, "Hello, world");
}

TEST(CommandLine, RenderEqualsTheGoldens) {
  std::ifstream calls(kRoot + "/tests/goldens/demo-calls.jsonl");
  std::string requests;
  std::vector<std::string> expected;
  for (std::string line; std::getline(calls, line);) {
    requests += line + "\n";
    expected.push_back(Json::parse(line)["rendered"]);
  }
  const Outcome rendered = run("render " + kDemo, requests);
  ASSERT_EQ(rendered.exit_code, 0);
  const auto lines = lines_of(rendered.output);
  ASSERT_EQ(lines.size(), expected.size());
  for (size_t i = 0; i < lines.size(); ++i) EXPECT_EQ(lines[i], expected[i]);
}

TEST(CommandLine, PlanPrintsTheProgram) {
  const Outcome plan = run("plan qwen3.5-397b-a17b --tp 8 --device h100");
  EXPECT_EQ(plan.exit_code, 0);
  EXPECT_NE(plan.output.find("memory"), std::string::npos);
  EXPECT_NE(plan.output.find("2.435 GB"), std::string::npos) << plan.output;
}

TEST(CommandLine, PlanPredictsThePromptBeforeTheStep) {
  EXPECT_EQ(run("plan qwen3.5-0.8b --device h200").output.find("prompt  "), std::string::npos);
  const Outcome plan = run("plan qwen3.5-0.8b --device h200 --input-len 10000");
  EXPECT_EQ(plan.exit_code, 0);
  EXPECT_NE(plan.output.find("a prompt of 10000 tokens, in steps of 8192"), std::string::npos) << plan.output;
}

// Every operation of a decoding step and of a prompt's, with bytes, a floor and a prediction; times that add up to
// about the step.
TEST(CommandLine, BenchOpsTimesEveryOperationOfAStep) {
  for (const std::string flags : {"", " --prefill --input-len 40"}) {
    const Outcome outcome = run("bench ops --model demo --device cpu --max-model-len 256 --rounds 3 --json" + flags);
    ASSERT_EQ(outcome.exit_code, 0) << flags;
    const Json report = Json::parse(outcome.output);
    EXPECT_EQ(report["step"], flags.empty() ? "decode" : "prefill");
    EXPECT_EQ(report["regime"], flags.empty() ? "few" : "some");
    EXPECT_GT(report["predicted_step_us"].get<double>(), 0);
    std::map<std::string, Json> rows;
    for (const Json& row : report["operations"]) rows[row["operation"]] = row;
    double us = 0;
    for (const char* name : {"gdn_mixer", "attention", "experts", "linear o_proj", "linear lm_head"}) {
      ASSERT_TRUE(rows.contains(name)) << name << outcome.output;
      const Json& row = rows[name];
      for (const char* key : {"us", "mb", "gb_s", "gflop", "floor_us", "predicted_us", "preset_byte_us"}) {
        EXPECT_GT(row[key].get<double>(), 0) << name << " " << key;
      }
      EXPECT_NE(row["shape"], "") << name;
      us += row["us"].get<double>();
    }
    EXPECT_EQ(rows["linear lm_head"]["phases"], 1);
    EXPECT_EQ(rows["attention"]["launches"], 2);  // of the demo model's eight layers
    EXPECT_EQ(rows["sampling"].contains("family"), false);
    EXPECT_LT(us, 5 * report["step_us"].get<double>());
  }
  EXPECT_NE(run("bench ops --model demo --device cpu").output.find("the whole step, as it runs"), std::string::npos);
}

TEST(CommandLine, ErrorsAreOneSentenceAndExitCodeOne) {
  const auto expect_error = [](const std::string& arguments, const std::string& part, const std::string& input = "") {
    const Outcome outcome = run(arguments, input, true);
    EXPECT_EQ(outcome.exit_code, 1) << arguments;
    EXPECT_NE(outcome.output.find(part), std::string::npos) << arguments << " gave: " << outcome.output;
  };
  expect_error("plan no-such-model", "qwen3.5-0.8b");
  expect_error("plan qwen3.5-0.8b --device abacus", "h100");
  expect_error("plan qwen3.5-0.8b --tp 7", "7");
  expect_error("tokenize /nonexistent", "/nonexistent/tokenizer.json");
  expect_error("tokenize " + kDemo + " --jsonl", "line 2", "\"fine\"\nnot json\n");
  expect_error("render " + kDemo, "messages", "{}\n");
  expect_error("serve qwen3.5-0.8b", "--load-format dummy");
  expect_error("bench ops --model demo --device cpu --prefill --input-len 600", "--max-num-batched-tokens");
  expect_error("serve " + kDemo + " --max-model-len 99999999", "--max-model-len");
}

TEST(CommandLine, HelpStatesDefaults) {
  const Outcome help = run("serve --help");
  EXPECT_EQ(help.exit_code, 0);
  for (const char* part : {"--port", "8000", "--max-num-seqs", "--dtype", "--api-key"}) {
    EXPECT_NE(help.output.find(part), std::string::npos) << part;
  }
  EXPECT_NE(run("", "", true).exit_code, 0) << "a subcommand is required";
  EXPECT_NE(run("version").output.find("tokenspeed "), std::string::npos);
}

}  // namespace
}  // namespace tokenspeed::app
