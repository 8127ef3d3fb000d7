// Any bytes as the body of every POST endpoint, the endpoint by the first byte: each must be answered with valid JSON
// and a status of the API, or with work that is held.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "server/router.h"

namespace {

using namespace tokenspeed;

void require(bool condition) {
  if (!condition) std::abort();
}

constexpr int32_t kVocabulary = 8192;

// Every token is 0, at once.
class ZeroRunner final : public runtime::Runner {
 public:
  const runtime::Capacity& capacity() const override { return capacity_; }
  Status submit(std::span<const runtime::SequenceStep> sequences) override {
    results_.clear();
    for (const auto& sequence : sequences) {
      runtime::SequenceResult result;
      if (sequence.sample) result.token = 0;
      if (sequence.sample && sequence.sampling->logprobs >= 0) result.logprobs.push_back({});
      result.prompt_logprobs.resize(sequence.next_tokens.size());
      results_.push_back(std::move(result));
    }
    return {};
  }
  Status wait(std::vector<runtime::SequenceResult>* results) override {
    *results = std::move(results_);
    return {};
  }

 private:
  runtime::Capacity capacity_{.pages = 1024,
                              .page_size = 16,
                              .state_slots = 16,
                              .max_step_tokens = 256,
                              .max_sequences = 8,
                              .max_model_length = 1024,
                              .vocabulary_size = kVocabulary};
  std::vector<runtime::SequenceResult> results_;
};

// Events are dropped, held work is released at once: what is tested is the way in.
class CheckingExchange final : public server::Exchange {
 public:
  void reply(int status, std::string_view, std::string_view body, std::string_view) override {
    require(!answered_);
    answered_ = true;
    require(status == 200 || status == 400 || status == 404 || status == 429 || status == 503);
    const auto json = nlohmann::json::parse(body, nullptr, false);
    require(json.is_object() && json.contains("error") == (status != 200));
  }
  void begin_stream() override {}
  void write(std::string_view) override {}
  void end_stream() override {}
  Poster poster() override {
    return [](std::function<void()>) {};
  }
  void hold(std::shared_ptr<void>) override { held_ = true; }
  bool answered() const { return answered_ != held_; }

 private:
  bool answered_ = false;
  bool held_ = false;
};

server::ServerContext& context() {
  static engine::Engine engine(std::make_unique<ZeroRunner>(), {});
  static server::ServerContext context(
      {},
      server::load_served_model("demo", std::string(TOKENSPEED_SOURCE_DIR) + "/models/demo", 1024, kVocabulary).value(),
      engine);
  return context;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  constexpr const char* kPaths[] = {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"};
  server::HttpRequest request;
  request.method = "POST";
  request.target = kPaths[data[0] % std::size(kPaths)];
  request.body.assign(reinterpret_cast<const char*>(data) + 1, size - 1);
  CheckingExchange exchange;
  server::route(context(), std::move(request), exchange);
  require(exchange.answered());
  return 0;
}
