#include "server/generation.h"

#include <chrono>
#include <random>

#include "server/answer_format.h"
#include "server/choice.h"
#include "server/json_errors.h"
#include "server/json_text.h"
#include "text/tool_call_constraint.h"

namespace tokenspeed::server {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

uint64_t random_seed() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

// Of the engine's interface, for a chat answer with tools.
class ArgumentConstraint final : public engine::TokenConstraint {
 public:
  explicit ArgumentConstraint(text::ToolCallConstraint constraint) : constraint_(std::move(constraint)) {}
  void push(int32_t token) override { constraint_.push(token); }
  std::span<const int32_t> allowed() override { return constraint_.allowed(); }

 private:
  text::ToolCallConstraint constraint_;
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(ServerContext& context, GenerationRequest request, Exchange& exchange)
      : context_(context),
        request_(std::move(request)),
        exchange_(exchange),
        format_(context_.model, request_, ++context_.requests) {
    if (!request_.fields.seeded) request_.fields.sampling.seed = random_seed();
  }

  ~Generation() {
    if (begun_ && !done_) context_.metrics.observe_request(seconds_since(start_), "abort");
  }

  Status submit() {
    const auto n = static_cast<size_t>(request_.fields.n);
    choices_.resize(request_.prompts.size() * n);
    for (size_t i = 0; i < choices_.size(); ++i) {
      prepare(choices_[i], i / n);
      TS_RETURN_IF_ERROR(submit_choice(i));
    }
    return {};
  }

  void begin() {
    begun_ = true;
    if (request_.fields.stream) exchange_.begin_stream();
  }

 private:
  void prepare(Choice& choice, size_t prompt) {
    const GenerationFields& fields = request_.fields;
    choice.prompt = prompt;
    if (context_.model.tokenizer) choice.detokenizer.emplace(*context_.model.tokenizer, fields.skip_special_tokens);
    if (!fields.stop.empty()) choice.stops.emplace(fields.stop, fields.include_stop);
    if (request_.chat) {
      choice.parser.emplace(request_.parser, random_seed());
      if (!request_.forced_prefix.empty()) take(choice, choice.parser->push(request_.forced_prefix), &choice.pending);
    } else if (request_.echo) {
      choice.content = request_.prompts[prompt].text;
    }
  }

  Status submit_choice(size_t index) {
    const GenerationFields& fields = request_.fields;
    engine::Request request;
    request.prompt = request_.prompts[choices_[index].prompt].tokens;
    request.max_tokens = fields.max_tokens;
    request.sampling = fields.sampling;
    request.sampling.seed += index * 0x9E3779B97F4A7C15ull;  // choice 0 is what n = 1 gives
    request.stop_token_ids = fields.stop_token_ids;
    request.ignore_eos = fields.ignore_eos;
    if (request_.chat && request_.parser.parse_tool_calls) {
      request.constraint = std::make_unique<ArgumentConstraint>(text::ToolCallConstraint(
          *context_.model.tokenizer, *context_.model.sorted_vocabulary, request_.parser, request_.forced_prefix));
    }
    auto handle = context_.engine.submit(
        std::move(request), [post = exchange_.poster(), weak = weak_from_this(), index](engine::Event&& event) {
          auto shared = std::make_shared<engine::Event>(std::move(event));
          post([weak, index, shared] {
            if (const auto self = weak.lock()) self->on_event(index, *shared);
          });
        });
    if (!handle.ok()) return handle.status();
    choices_[index].handle = std::move(handle).value();
    return {};
  }

  void on_event(size_t index, engine::Event& event) {
    Choice& choice = choices_[index];
    if (choice.finished || done_) return;
    if (event.finished && event.reason == engine::FinishReason::kError) return fail(event.error);
    if (event.finished && event.reason == engine::FinishReason::kCancelled) {
      return fail(unavailable("The server is shutting down; send the request again later."));
    }
    observe(choice, event);
    choice.cached_tokens = std::max(choice.cached_tokens, event.cached_tokens);
    for (auto& entry : event.prompt_logprobs) choice.prompt_logprobs.push_back(std::move(entry));
    choice.tokens.insert(choice.tokens.end(), event.tokens.begin(), event.tokens.end());
    std::string delta = std::exchange(choice.pending, {});
    bool stopped = false;
    add_text(choice, new_text(choice, event, &stopped), &delta);
    const bool one_call = !request_.parallel_tool_calls && choice.parser && choice.parser->tool_calls() >= 1;
    if (event.finished || stopped || one_call) {
      const bool cut_off = event.reason == engine::FinishReason::kLength && !stopped && !one_call;
      end_choice(choice, event.finished && cut_off, &delta);
      if (!event.finished) choice.handle.cancel();
    }
    if (request_.fields.stream) {
      std::string out;
      format_.append_chunks(out, index, choice, delta, event);
      if (!out.empty()) exchange_.write(out);
    } else {
      for (auto& entry : event.logprobs) choice.logprobs.push_back(std::move(entry));
    }
    if (finished_ == choices_.size()) finish();
  }

  void observe(Choice& choice, const engine::Event& event) {
    if (event.tokens.empty()) return;
    const auto now = Clock::now();
    if (event.first)
      context_.metrics.observe_first_token(seconds_since(start_));
    else
      context_.metrics.observe_inter_token(std::chrono::duration<double>(now - choice.last_token).count());
    choice.last_token = now;
  }

  // The text that the event settles, up to a stop string.
  std::string new_text(Choice& choice, const engine::Event& event, bool* stopped) const {
    std::string text;
    if (choice.detokenizer) {
      const bool by_token = event.finished && event.reason == engine::FinishReason::kStop;
      for (size_t i = 0; i < event.tokens.size(); ++i) {
        // The token that stopped the request is not part of the text.
        const bool hidden = by_token && i + 1 == event.tokens.size() && !request_.fields.include_stop;
        if (!hidden) text += choice.detokenizer->push(event.tokens[i]);
      }
      if (event.finished) text += choice.detokenizer->finish();
    }
    if (!choice.stops) return text;
    auto output = choice.stops->push(text);
    *stopped = output.stopped;
    if (event.finished && !output.stopped) output.text += choice.stops->finish();
    return std::move(output.text);
  }

  void add_text(Choice& choice, const std::string& text, std::string* delta) {
    if (choice.parser) return take(choice, choice.parser->push(text), delta);
    if (request_.fields.stream)
      append_json_escaped(*delta, text);
    else
      choice.content += text;
  }

  // Adds a parser's output to the choice, or as chunks' delta objects to `out` when streaming.
  void take(Choice& choice, std::vector<text::OutputDelta>&& deltas, std::string* out) {
    using Kind = text::OutputDelta::Kind;
    for (text::OutputDelta& delta : deltas) {
      const bool call = delta.kind == Kind::kToolCallStart || delta.kind == Kind::kToolCallArguments;
      if (!request_.parallel_tool_calls && (delta.tool_index > 0 || (!call && !choice.calls.empty()))) continue;
      if (delta.kind == Kind::kToolCallStart) {
        choice.calls.push_back({delta.tool_id, delta.tool_name, delta.text});
      } else if (delta.text.empty()) {
        continue;
      }
      if (request_.fields.stream) {
        append_delta_object(*out, delta);
      } else if (delta.kind == Kind::kReasoning) {
        choice.reasoning += delta.text;
      } else if (delta.kind == Kind::kContent) {
        choice.content += delta.text;
      } else if (delta.kind == Kind::kToolCallArguments) {
        choice.calls.back().arguments += delta.text;
      }
    }
  }

  void end_choice(Choice& choice, bool cut_off, std::string* delta) {
    choice.finished = true;
    if (choice.parser) take(choice, choice.parser->finish(), delta);
    const bool called = choice.parser && choice.parser->tool_calls() > 0;
    choice.finish_reason = called ? "tool_calls" : cut_off ? "length" : "stop";
    context_.metrics.observe_request(seconds_since(start_), cut_off ? "length" : "stop");
    ++finished_;
  }

  void finish() {
    done_ = true;
    if (!request_.fields.stream) return exchange_.reply(200, "application/json", format_.whole(choices_));
    exchange_.write((request_.fields.include_usage ? format_.usage_event(choices_) : "") + "data: [DONE]\n\n");
    exchange_.end_stream();
  }

  void fail(const Status& status) {
    done_ = true;
    for (Choice& choice : choices_) choice.handle.cancel();
    context_.metrics.observe_request(seconds_since(start_), "error");
    if (!request_.fields.stream) return reply_error(exchange_, status);
    exchange_.write(error_event(status) + "data: [DONE]\n\n");
    exchange_.end_stream();
  }

  ServerContext& context_;
  GenerationRequest request_;
  Exchange& exchange_;
  const AnswerFormat format_;
  std::vector<Choice> choices_;
  size_t finished_ = 0;
  bool begun_ = false;
  bool done_ = false;
  const Clock::time_point start_ = Clock::now();
};

}  // namespace

void start_generation(ServerContext& context, GenerationRequest request, Exchange& exchange) {
  auto generation = std::make_shared<Generation>(context, std::move(request), exchange);
  if (const Status status = generation->submit(); !status.ok()) return reply_error(exchange, status);
  generation->begin();
  exchange.hold(std::move(generation));
}

}  // namespace tokenspeed::server
