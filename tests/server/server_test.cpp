// The server over real loopback sockets, with the real engine over a runner that says what the test scripts.
#include "server/server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

namespace tokenspeed::server {
namespace {

using Json = nlohmann::json;
using Tcp = boost::asio::ip::tcp;
constexpr int32_t kVocabulary = 8192;

// Answers every sequence with the script, then with the end token for ever.
class ScriptedRunner final : public runtime::Runner {
 public:
  struct Script {
    std::vector<int32_t> tokens;
    int32_t end = 0;
    std::atomic<int> delay_us{0};
  };
  explicit ScriptedRunner(std::shared_ptr<Script> script) : script_(std::move(script)) {
    capacity_ = {.pages = 4096,
                 .page_size = 16,
                 .state_slots = 64,
                 .max_step_tokens = 512,
                 .max_sequences = 16,
                 .max_model_length = 2048,
                 .vocabulary_size = kVocabulary};
  }
  const runtime::Capacity& capacity() const override { return capacity_; }
  Status submit(std::span<const runtime::SequenceStep> sequences) override {
    std::this_thread::sleep_for(std::chrono::microseconds(script_->delay_us));
    results_.clear();
    for (const auto& sequence : sequences) {
      runtime::SequenceResult result;
      if (sequence.sample) {
        const size_t at = sequence.output.size();
        result.token = at < script_->tokens.size() ? script_->tokens[at] : script_->end;
        if (sequence.sampling->logprobs >= 0)
          result.logprobs.push_back({result.token, -0.5f, 1, {{result.token, -0.5f}}});
      }
      for (const int32_t next : sequence.next_tokens)
        result.prompt_logprobs.push_back({next, -1.0f, 1, {{next, -1.0f}}});
      results_.push_back(std::move(result));
    }
    return {};
  }
  Status wait(std::vector<runtime::SequenceResult>* results) override {
    *results = std::move(results_);
    return {};
  }

 private:
  std::shared_ptr<Script> script_;
  runtime::Capacity capacity_;
  std::vector<runtime::SequenceResult> results_;
};

struct Answer {
  int status = 0;
  std::string head;
  std::string body;
};

std::string unchunk(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t size = std::stoul(std::string(text.substr(0, text.find('\r'))), nullptr, 16);
    text.remove_prefix(text.find('\n') + 1);
    out += text.substr(0, size);
    text.remove_prefix(std::min(text.size(), size + 2));
  }
  return out;
}

Answer parse_answer(const std::string& raw) {
  Answer answer;
  const size_t split = raw.find("\r\n\r\n");
  if (split == std::string::npos) return answer;
  answer.head = raw.substr(0, split);
  answer.status = std::stoi(raw.substr(9, 3));
  answer.body = raw.substr(split + 4);
  if (answer.head.find("chunked") != std::string::npos) answer.body = unchunk(answer.body);
  return answer;
}

class ServerTest : public testing::Test {
 protected:
  void SetUp() override { start({.host = "127.0.0.1", .port = 0, .api_key = "", .max_body_bytes = 1 << 20}); }

  void start(ServerOptions options) {
    const std::string directory = std::string(TOKENSPEED_SOURCE_DIR) + "/models/demo";
    server_.reset();
    auto model = load_served_model("demo", directory, 2048, kVocabulary);
    ASSERT_TRUE(model.ok()) << model.status().message();
    script_->end = model->stop_token_ids.at(0);
    auto tokenizer = text::Tokenizer::load(directory + "/tokenizer.json");
    ASSERT_TRUE(tokenizer.ok());
    tokenizer_.emplace(std::move(tokenizer).value());
    engine_ = std::make_unique<engine::Engine>(std::make_unique<ScriptedRunner>(script_), engine::EngineOptions{});
    auto server = Server::start(std::move(options), std::move(model).value(), *engine_);
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(server).value();
  }

  void say(const std::string& text) { script_->tokens = tokenizer_->encode(text).value(); }

  Tcp::socket connect() {
    Tcp::socket socket(io_);
    socket.connect({boost::asio::ip::make_address("127.0.0.1"), server_->port()});
    return socket;
  }
  static std::string head(const std::string& method, const std::string& path, size_t length, const char* connection) {
    return method + " " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + std::to_string(length) +
           "\r\nConnection: " + connection + "\r\n\r\n";
  }
  Answer raw(const std::string& bytes) {
    auto socket = connect();
    boost::system::error_code error;
    boost::asio::write(socket, boost::asio::buffer(bytes), error);
    std::string out;
    boost::asio::read(socket, boost::asio::dynamic_buffer(out), error);
    return parse_answer(out);
  }
  Answer get(const std::string& path) { return raw(head("GET", path, 0, "close")); }
  Answer post(const std::string& path, const std::string& body) {
    return raw(head("POST", path, body.size(), "close") + body);
  }
  Json chat(Json extra = Json::object()) {
    extra["messages"] = {{{"role", "user"}, {"content", "Hello"}}};
    return extra;
  }
  static std::vector<Json> events(const Answer& answer) {
    std::vector<Json> out;
    for (size_t at = 0; (at = answer.body.find("data: ", at)) != std::string::npos;) {
      const size_t end = answer.body.find("\n\n", at);
      const std::string data = answer.body.substr(at + 6, end - at - 6);
      if (data != "[DONE]") out.push_back(Json::parse(data));
      at = end;
    }
    return out;
  }
  bool idle_within(std::chrono::milliseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (std::chrono::steady_clock::now() < end) {
      if (engine_->statistics().running + engine_->statistics().waiting == 0) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return false;
  }

  boost::asio::io_context io_;
  std::shared_ptr<ScriptedRunner::Script> script_ = std::make_shared<ScriptedRunner::Script>();
  std::optional<text::Tokenizer> tokenizer_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<Server> server_;
};

const Json kTools = Json::parse(R"([{"type":"function","function":{"name":"get_weather","parameters":{"type":"object",
  "properties":{"city":{"type":"string"},"days":{"type":"integer"}}}}}])");
const char* kCall =
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>";

TEST_F(ServerTest, PlainEndpoints) {
  EXPECT_EQ(Json::parse(get("/v1/models").body)["data"][0]["id"], "demo");
  EXPECT_EQ(get("/v1/models/demo").status, 200);
  EXPECT_EQ(Json::parse(get("/v1/models/other").body)["error"]["code"], "model_not_found");
  EXPECT_EQ(get("/health").status, 200);
  EXPECT_EQ(get("/version").status, 200);
  EXPECT_NE(get("/").body.find("demo"), std::string::npos);
  EXPECT_NE(get("/metrics").body.find("vllm:num_requests_running{model_name=\"demo\"}"), std::string::npos);
  EXPECT_EQ(get("/nothing").status, 404);
  EXPECT_EQ(get("/v1/completions").status, 405);
}

TEST_F(ServerTest, ChatWhole) {
  say("I think.\n</think>\n\nHello there.");
  const Answer answer = post("/v1/chat/completions", chat({{"logprobs", true}, {"n", 2}}).dump());
  ASSERT_EQ(answer.status, 200) << answer.body;
  const Json json = Json::parse(answer.body);
  ASSERT_EQ(json["choices"].size(), 2u);
  EXPECT_EQ(json["choices"][1]["message"]["content"], "Hello there.");
  EXPECT_EQ(json["choices"][0]["message"]["reasoning_content"], "I think.");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(json["choices"][0]["logprobs"]["content"].size(), script_->tokens.size() + 1);
  EXPECT_EQ(json["usage"]["completion_tokens"], 2 * (script_->tokens.size() + 1));
}

TEST_F(ServerTest, ChatStreamEqualsWhole) {
  say("I think.\n</think>\n\nHello \"you\"\nthere.");
  const Answer answer =
      post("/v1/chat/completions", chat({{"stream", true}, {"stream_options", {{"include_usage", true}}}}).dump());
  ASSERT_EQ(answer.status, 200);
  EXPECT_TRUE(answer.body.ends_with("data: [DONE]\n\n"));
  std::string content, reasoning;
  const auto chunks = events(answer);
  ASSERT_GT(chunks.size(), 3u);
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["role"], "assistant");
  for (const Json& chunk : chunks) {
    if (chunk["choices"].empty()) continue;
    content += chunk["choices"][0]["delta"].value("content", "");
    reasoning += chunk["choices"][0]["delta"].value("reasoning_content", "");
  }
  EXPECT_EQ(content, "Hello \"you\"\nthere.");
  EXPECT_EQ(reasoning, "I think.");
  EXPECT_EQ(chunks[chunks.size() - 2]["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(chunks.back()["usage"]["completion_tokens"], script_->tokens.size() + 1);
}

TEST_F(ServerTest, ToolCallsWholeAndStreamed) {
  say(std::string("Look.\n</think>\n\n") + kCall);
  const Json whole = Json::parse(post("/v1/chat/completions", chat({{"tools", kTools}}).dump()).body);
  EXPECT_EQ(whole["choices"][0]["finish_reason"], "tool_calls");
  const Json call = whole["choices"][0]["message"]["tool_calls"][0];
  EXPECT_EQ(Json::parse(call["function"]["arguments"].get<std::string>()), Json({{"city", "Rome"}, {"days", 3}}));
  std::string arguments, name;
  for (const Json& chunk : events(post("/v1/chat/completions", chat({{"tools", kTools}, {"stream", true}}).dump()))) {
    const Json& delta = chunk["choices"][0]["delta"];
    if (!delta.contains("tool_calls")) continue;
    name += delta["tool_calls"][0]["function"].value("name", "");
    arguments += delta["tool_calls"][0]["function"]["arguments"].get<std::string>();
  }
  EXPECT_EQ(name, "get_weather");
  EXPECT_EQ(arguments, call["function"]["arguments"]);
}

TEST_F(ServerTest, RequiredCallIsForcedAndOneCallOnly) {
  const std::string rest = std::string(kCall).substr(std::string("<tool_call>\n<function=get_weather>\n").size());
  say(rest + "\n" + kCall);
  const Json request = chat({{"tools", kTools}, {"tool_choice", "required"}, {"parallel_tool_calls", false}});
  const Json json = Json::parse(post("/v1/chat/completions", request.dump()).body);
  ASSERT_EQ(json["choices"][0]["message"]["tool_calls"].size(), 1u);
  EXPECT_EQ(json["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "get_weather");
  EXPECT_TRUE(idle_within(std::chrono::seconds(2)));
}

TEST_F(ServerTest, StopStringEndsTheText) {
  say("</think>\n\none two three four");
  const Json json = Json::parse(post("/v1/chat/completions", chat({{"stop", " three"}}).dump()).body);
  EXPECT_EQ(json["choices"][0]["message"]["content"], "one two");
  EXPECT_EQ(json["choices"][0]["finish_reason"], "stop");
}

TEST_F(ServerTest, CompletionsWithTokenIdsEchoAndLogprobs) {
  say("abc def");
  const Json request = {
      {"prompt", {1, 2, 3}}, {"echo", true}, {"logprobs", 2}, {"return_token_ids", true}, {"max_tokens", 2}};
  const Answer answer = post("/v1/completions", request.dump());
  ASSERT_EQ(answer.status, 200) << answer.body;
  const Json choice = Json::parse(answer.body)["choices"][0];
  EXPECT_EQ(choice["prompt_token_ids"], Json({1, 2, 3}));
  EXPECT_EQ(choice["token_ids"].size(), 2u);
  EXPECT_EQ(choice["logprobs"]["tokens"].size(), 5u);
  EXPECT_TRUE(choice["logprobs"]["token_logprobs"][0].is_null());
  EXPECT_EQ(choice["finish_reason"], "length");
}

TEST_F(ServerTest, TokenizeThereAndBack) {
  const Json ids = Json::parse(post("/tokenize", R"({"prompt":"Hello you","return_token_strs":true})").body);
  EXPECT_EQ(ids["count"], ids["tokens"].size());
  EXPECT_EQ(ids["token_strs"].size(), ids["tokens"].size());
  EXPECT_EQ(Json::parse(post("/detokenize", Json({{"tokens", ids["tokens"]}}).dump()).body)["prompt"], "Hello you");
}

TEST_F(ServerTest, BadInputIsNamed) {
  struct Case {
    const char* path;
    std::string body;
    int status;
    const char* param;
  };
  const auto with = [&](const std::string& field) {
    return R"({"messages":[{"role":"user","content":"a"}],)" + field + "}";
  };
  const Case cases[] = {
      {"/v1/chat/completions", "{", 400, nullptr},
      {"/v1/chat/completions", "[]", 400, nullptr},
      {"/v1/chat/completions", "{\"messages\":\"\xff\"}", 400, nullptr},
      {"/v1/chat/completions", std::string(500000, '['), 400, nullptr},
      {"/v1/chat/completions", "{}", 400, "messages"},
      {"/v1/chat/completions", R"({"messages":[]})", 400, "messages"},
      {"/v1/chat/completions", R"({"messages":[{"role":"bot","content":"a"}]})", 400, "messages[0].role"},
      {"/v1/chat/completions", R"({"messages":[{"role":"user","content":[{"type":"image_url"}]}]})", 400,
       "messages[0].content"},
      {"/v1/chat/completions", with(R"("temperature":-1)"), 400, "temperature"},
      {"/v1/chat/completions", with(R"("temperature":"hot")"), 400, "temperature"},
      {"/v1/chat/completions", with(R"("temperature":NaN)"), 400, nullptr},
      {"/v1/chat/completions", with(R"("top_p":0)"), 400, "top_p"},
      {"/v1/chat/completions", with(R"("n":0)"), 400, "n"},
      {"/v1/chat/completions", with(R"("max_tokens":99999)"), 400, "max_tokens"},
      {"/v1/chat/completions", with(R"("logit_bias":{"x":1})"), 400, "logit_bias"},
      {"/v1/chat/completions", with(R"("tool_choice":"required")"), 400, "tool_choice"},
      {"/v1/chat/completions", with(R"("model":"other")"), 404, "model"},
      {"/v1/completions", R"({"prompt":[]})", 400, "prompt"},
      {"/v1/completions", R"({"prompt":[99999]})", 400, "prompt"},
      {"/v1/completions", R"({"prompt":"a","suffix":"b"})", 400, "suffix"},
      {"/v1/completions", R"({"prompt":"a","logprobs":21})", 400, "logprobs"},
  };
  for (const Case& entry : cases) {
    const Answer answer = post(entry.path, entry.body);
    EXPECT_EQ(answer.status, entry.status) << entry.body.substr(0, 200);
    const Json error = Json::parse(answer.body)["error"];
    EXPECT_FALSE(error["message"].get<std::string>().empty());
    if (entry.param != nullptr) {
      EXPECT_EQ(error["param"], entry.param) << answer.body;
    }
  }
  EXPECT_EQ(post("/v1/completions", std::string(2 << 20, ' ')).status, 413);
  EXPECT_EQ(raw("NONSENSE\r\n\r\n").status, 400);
  EXPECT_EQ(get("/health").status, 200);
}

TEST_F(ServerTest, KeepAliveAnswersPipelinedRequestsInOrder) {
  const Answer answer = raw(head("GET", "/version", 0, "keep-alive") + head("GET", "/nothing", 0, "close"));
  EXPECT_EQ(answer.status, 200);
  EXPECT_NE(answer.body.find("HTTP/1.1 404"), std::string::npos);
}

TEST_F(ServerTest, DroppedConnectionCancels) {
  script_->tokens.assign(4000, 40);
  script_->delay_us = 2000;
  const std::string body = chat({{"stream", true}}).dump();
  {
    auto socket = connect();
    boost::asio::write(socket, boost::asio::buffer(head("POST", "/v1/chat/completions", body.size(), "close") + body));
    std::string some(300, ' ');  // more than the head: a token has come
    boost::asio::read(socket, boost::asio::buffer(some));
    EXPECT_EQ(engine_->statistics().running, 1);
  }
  EXPECT_TRUE(idle_within(std::chrono::milliseconds(500)));
}

TEST_F(ServerTest, KeyIsAskedFor) {
  start({.host = "127.0.0.1", .port = 0, .api_key = "secret", .max_body_bytes = 1 << 20});
  EXPECT_EQ(get("/v1/models").status, 401);
  EXPECT_EQ(get("/health").status, 200);
  EXPECT_EQ(
      raw("GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nConnection: close\r\n\r\n").status,
      200);
}

TEST_F(ServerTest, PortInUseNamesTheRemedy) {
  auto model = load_served_model("demo", std::string(TOKENSPEED_SOURCE_DIR) + "/models/demo", 2048, kVocabulary);
  ASSERT_TRUE(model.ok());
  auto second =
      Server::start({.host = "127.0.0.1", .port = server_->port(), .api_key = ""}, std::move(model).value(), *engine_);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("--port"), std::string::npos);
}

TEST_F(ServerTest, StopEndsStreams) {
  script_->tokens.assign(4000, 40);
  script_->delay_us = 2000;
  const std::string body = chat({{"stream", true}}).dump();
  auto socket = connect();
  boost::asio::write(socket, boost::asio::buffer(head("POST", "/v1/chat/completions", body.size(), "close") + body));
  std::string some(300, ' ');  // more than the head: a token has come
  boost::asio::read(socket, boost::asio::buffer(some));
  EXPECT_EQ(engine_->statistics().running, 1);
  server_->stop();
  EXPECT_TRUE(idle_within(std::chrono::milliseconds(500)));
}

}  // namespace
}  // namespace tokenspeed::server
