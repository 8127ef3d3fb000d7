// The server over real loopback sockets, with the real engine over a runner that says what the test scripts.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <functional>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "server/server.h"

namespace tokenspeed::server {

using Json = nlohmann::json;
using Tcp = boost::asio::ip::tcp;
inline const std::string kSource = TOKENSPEED_SOURCE_DIR;
inline constexpr int32_t kVocabulary = 8192;

// Answers every sequence with the script, then with the end token for ever.
class ScriptedRunner final : public runtime::Runner {
 public:
  struct Script {
    std::vector<int32_t> tokens;
    int32_t end = 0;
    std::atomic<int> delay_us{0};
    size_t fail_at = SIZE_MAX;  // the sequence fails when it should give this output token
    // Of every request, when its first token is sampled.
    std::vector<runtime::SamplingParameters> seen() const {
      const std::lock_guard lock(mutex_);
      return seen_;
    }

   private:
    friend class ScriptedRunner;
    mutable std::mutex mutex_;
    std::vector<runtime::SamplingParameters> seen_;
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
        if (at == 0) {
          const std::lock_guard lock(script_->mutex_);
          script_->seen_.push_back(*sequence.sampling);
        }
        if (at >= script_->fail_at) result.status = internal_error("the logits are not finite");
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

inline std::string unchunk(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t size = std::stoul(std::string(text.substr(0, text.find('\r'))), nullptr, 16);
    text.remove_prefix(text.find('\n') + 1);
    out += text.substr(0, size);
    text.remove_prefix(std::min(text.size(), size + 2));
  }
  return out;
}

inline Answer parse_answer(const std::string& raw) {
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
  static ServerOptions options() { return {.host = "127.0.0.1", .port = 0, .api_key = "", .max_body_bytes = 1 << 20}; }
  void SetUp() override { start(options()); }

  void start(ServerOptions options, engine::EngineOptions engine_options = {},
             const std::string& directory = kSource + "/models/demo") {
    server_.reset();
    auto model = load_served_model("demo", directory, 2048, kVocabulary);
    ASSERT_TRUE(model.ok()) << model.status().message();
    if (!model->stop_token_ids.empty()) script_->end = model->stop_token_ids.at(0);
    auto tokenizer = text::Tokenizer::load(kSource + "/models/demo");
    ASSERT_TRUE(tokenizer.ok());
    tokenizer_.emplace(std::move(tokenizer).value());
    engine_ = std::make_unique<engine::Engine>(std::make_unique<ScriptedRunner>(script_), engine_options);
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
  // The engine tells its counts of requests after each step, when a client may have the step's token already.
  bool running_within(std::chrono::milliseconds limit, int64_t requests) {
    return holds_within(limit, [&](const engine::Statistics& now) { return now.running == requests; });
  }
  bool idle_within(std::chrono::milliseconds limit) {
    return holds_within(limit, [](const engine::Statistics& now) { return now.running + now.waiting == 0; });
  }
  bool holds_within(std::chrono::milliseconds limit, const std::function<bool(const engine::Statistics&)>& holds) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (std::chrono::steady_clock::now() < end) {
      if (holds(engine_->statistics())) return true;
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

inline const Json kTools =
    Json::parse(R"([{"type":"function","function":{"name":"get_weather","parameters":{"type":"object",
  "properties":{"city":{"type":"string"},"days":{"type":"integer"}}}}}])");
inline const char* const kCall =
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>";

}  // namespace tokenspeed::server
