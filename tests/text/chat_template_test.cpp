#include "text/chat_template.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace tokenspeed::text {
namespace {

using Json = nlohmann::ordered_json;

const std::string kSource = TOKENSPEED_SOURCE_DIR;

// OpenAI's argument strings become objects, as the server does before rendering.
void parse_arguments(Json& messages) {
  for (auto& message : messages) {
    if (!message.contains("tool_calls") || !message["tool_calls"].is_array()) continue;
    for (auto& call : message["tool_calls"]) {
      auto& arguments = call["function"]["arguments"];
      if (arguments.is_string()) arguments = Json::parse(arguments.get<std::string>());
    }
  }
}

std::string rendered(const ChatTemplate& chat_template, const Json& request) {
  auto result = chat_template.render(request.dump());
  return result.ok() ? *result : "error: " + result.status().message();
}

TEST(ChatTemplate, RendersTheDemoConversations) {
  auto chat_template = load_chat_template(kSource + "/models/demo");
  ASSERT_TRUE(chat_template.ok()) << chat_template.status().message();
  std::ifstream file(kSource + "/tests/goldens/demo-chat-template.json");
  const Json cases = Json::parse(file);
  ASSERT_GE(cases.size(), 8u);
  for (const auto& golden : cases) {
    Json request = golden["kwargs"];
    request["messages"] = golden["messages"];
    request["tools"] = golden["tools"];
    EXPECT_EQ(rendered(*chat_template, request), golden["rendered"].get<std::string>()) << golden["name"];
  }
}

TEST(ChatTemplate, RendersTheDemoCalls) {
  auto chat_template = load_chat_template(kSource + "/models/demo");
  ASSERT_TRUE(chat_template.ok()) << chat_template.status().message();
  std::ifstream file(kSource + "/tests/goldens/demo-calls.jsonl");
  size_t count = 0;
  for (std::string line; std::getline(file, line); ++count) {
    const Json golden = Json::parse(line);
    Json request = golden["chat_template_kwargs"];
    request["messages"] = golden["messages"];
    parse_arguments(request["messages"]);
    request["tools"] = golden["tools"];
    request["add_generation_prompt"] = true;
    EXPECT_EQ(rendered(*chat_template, request), golden["rendered"].get<std::string>()) << count;
  }
  EXPECT_EQ(count, 128u);
}

// Jinja2 itself is the oracle: it renders the public conversations and tool lists, a request and its prompt a line.
TEST(ChatTemplate, OfficialTemplateEqualsJinja2) {
  const std::string data = kSource + "/../shared/data";
  if (!std::filesystem::exists(data)) GTEST_SKIP() << "the shared data is not here";
  if (std::system("/usr/bin/python3 -c 'import jinja2' 2>/dev/null") != 0) GTEST_SKIP() << "no python3-jinja2";
  auto chat_template = load_chat_template(data + "/qwen3.5-397b-a17b");
  ASSERT_TRUE(chat_template.ok()) << chat_template.status().message();
  const std::string output = testing::TempDir() + "render_oracle_" + std::to_string(getpid()) + ".jsonl";
  const std::string command =
      "/usr/bin/python3 '" + kSource + "/tests/text/render_oracle.py' '" + data + "' '" + output + "'";
  ASSERT_EQ(std::system(command.c_str()), 0);
  std::ifstream file(output);
  size_t count = 0, wrong = 0;
  for (std::string request, expected; std::getline(file, request) && std::getline(file, expected) && wrong < 3;
       ++count) {
    auto result = chat_template->render(request);
    const Json oracle = Json::parse(expected);
    if (oracle.is_null()) {  // Jinja2 raised
      EXPECT_FALSE(result.ok()) << request.substr(0, 2000);
      wrong += result.ok();
      continue;
    }
    ASSERT_TRUE(result.ok()) << result.status().message() << request.substr(0, 2000);
    EXPECT_EQ(*result, oracle.get<std::string>());
    wrong += *result != oracle.get<std::string>();
  }
  std::filesystem::remove(output);
  EXPECT_GT(count, 2000u);
}

TEST(ChatTemplate, SaysWhatTheTemplateRaises) {
  auto chat_template = load_chat_template(kSource + "/models/demo");
  ASSERT_TRUE(chat_template.ok());
  auto result = chat_template->render(R"({"messages": []})");
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(result.status().message().find("No messages provided."), std::string::npos) << result.status().message();
  EXPECT_NE(result.status().message().find("line 24"), std::string::npos) << result.status().message();
}

TEST(ChatTemplate, RefusesMalformedRequests) {
  auto chat_template = ChatTemplate::parse("{{ messages }}");
  ASSERT_TRUE(chat_template.ok());
  for (const std::string request : {"", "[]", "{", "{\"a\": \"\xff\"}", "{\"a\": 01}"}) {
    EXPECT_FALSE(chat_template->render(request).ok()) << request;
  }
  EXPECT_FALSE(chat_template->render("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}").ok());
}

TEST(ChatTemplate, MissingDirectoryIsNotFound) {
  auto result = load_chat_template(std::string("/nonexistent"));
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace tokenspeed::text
