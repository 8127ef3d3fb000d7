#include "server/generation.h"

#include <chrono>
#include <ctime>
#include <random>

#include "server/choice.h"
#include "server/json_errors.h"
#include "server/json_text.h"
#include "server/logprob_json.h"

namespace tokenspeed::server {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string ids_json(const std::vector<int32_t>& ids) {
  std::string out = "[";
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    out += std::to_string(ids[i]);
  }
  return out + "]";
}

uint64_t random_seed() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32) | device();
}

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(ServerContext& context, GenerationRequest request, Exchange& exchange)
      : context_(context), request_(std::move(request)), exchange_(exchange) {
    if (!request_.fields.seeded) request_.fields.sampling.seed = random_seed();
    const uint64_t number = ++context_.requests;
    id_ = (request_.chat ? "chatcmpl-" : "cmpl-") + std::to_string(std::time(nullptr)) + "-" + std::to_string(number);
    head_ = "{\"id\":\"" + id_ + "\",\"object\":\"";
    head_ += request_.chat ? "chat.completion" : "text_completion";
    if (request_.chat && request_.fields.stream) head_ += ".chunk";
    head_ += "\",\"created\":" + std::to_string(std::time(nullptr)) + ",\"model\":" + json_quoted(context_.model.name);
  }

  Status submit() {
    const auto n = static_cast<size_t>(request_.fields.n);
    choices_.resize(request_.prompts.size() * n);
    for (size_t i = 0; i < choices_.size(); ++i) {
      prepare(i, i / n);
      TS_RETURN_IF_ERROR(submit_choice(i));
    }
    return {};
  }

  void begin() {
    if (request_.fields.stream) exchange_.begin_stream();
  }

 private:
  void prepare(size_t index, size_t prompt) {
    Choice& choice = choices_[index];
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
    observe(event);
    choice.cached_tokens = std::max(choice.cached_tokens, event.cached_tokens);
    for (auto& entry : event.prompt_logprobs) choice.prompt_logprobs.push_back(std::move(entry));
    std::string delta = std::move(choice.pending);
    choice.pending.clear();
    const bool by_token = event.finished && event.reason == engine::FinishReason::kStop;
    std::string text;
    for (size_t i = 0; i < event.tokens.size(); ++i) {
      choice.tokens.push_back(event.tokens[i]);
      // The token that stopped the request is not part of the text.
      const bool hidden = by_token && i + 1 == event.tokens.size() && !request_.fields.include_stop;
      if (choice.detokenizer && !hidden) text += choice.detokenizer->push(event.tokens[i]);
    }
    if (event.finished && choice.detokenizer) text += choice.detokenizer->finish();
    bool stopped = false;
    if (choice.stops) {
      auto output = choice.stops->push(text);
      text = std::move(output.text);
      stopped = output.stopped;
      if (event.finished && !stopped) text += choice.stops->finish();
    }
    add_text(choice, text, &delta);
    const bool one_call = !request_.parallel_tool_calls && choice.parser && choice.parser->tool_calls() >= 1;
    if (event.finished || stopped || one_call) {
      choice.finished = true;
      if (choice.parser) take(choice, choice.parser->finish(), &delta);
      const bool length = event.finished && event.reason == engine::FinishReason::kLength && !stopped && !one_call;
      choice.finish_reason = choice.parser && choice.parser->tool_calls() > 0 ? "tool_calls"
                             : length                                         ? "length"
                                                                              : "stop";
      if (!event.finished) choice.handle.cancel();
      context_.metrics.observe_request(seconds_since(start_), length ? "length" : "stop");
      ++finished_;
    }
    if (request_.fields.stream) write_chunk(index, delta, event);
    for (auto& entry : event.logprobs) choice.logprobs.push_back(std::move(entry));
    if (finished_ == choices_.size()) finish();
  }

  void observe(const engine::Event& event) {
    if (event.tokens.empty()) return;
    const auto now = Clock::now();
    if (event.first)
      context_.metrics.observe_first_token(seconds_since(start_));
    else
      context_.metrics.observe_inter_token(std::chrono::duration<double>(now - last_token_).count());
    last_token_ = now;
  }

  void add_text(Choice& choice, const std::string& text, std::string* delta) {
    if (choice.parser) return take(choice, choice.parser->push(text), delta);
    if (request_.fields.stream)
      append_json_escaped(*delta, text);
    else
      choice.content += text;
  }

  // Adds a parser's output to the choice, or as chunks' delta objects (one per line) to `out` when streaming.
  void take(Choice& choice, std::vector<text::OutputDelta>&& deltas, std::string* out) {
    using Kind = text::OutputDelta::Kind;
    const bool stream = request_.fields.stream;
    for (text::OutputDelta& delta : deltas) {
      const bool call = delta.kind == Kind::kToolCallStart || delta.kind == Kind::kToolCallArguments;
      if (!request_.parallel_tool_calls && (delta.tool_index > 0 || (!call && !choice.calls.empty()))) continue;
      if (delta.kind == Kind::kToolCallStart)
        choice.calls.push_back({delta.tool_id, delta.tool_name, delta.text});
      else if (stream && delta.text.empty())
        continue;
      if (!stream) {
        if (delta.kind == Kind::kReasoning)
          choice.reasoning += delta.text;
        else if (delta.kind == Kind::kContent)
          choice.content += delta.text;
        else if (delta.kind == Kind::kToolCallArguments)
          choice.calls.back().arguments += delta.text;
        continue;
      }
      if (!out->empty()) *out += '\n';
      if (call) {
        *out += "{\"tool_calls\":[{\"index\":" + std::to_string(delta.tool_index);
        if (delta.kind == Kind::kToolCallStart) {
          *out += ",\"id\":" + json_quoted(delta.tool_id) +
                  ",\"type\":\"function\",\"function\":{\"name\":" + json_quoted(delta.tool_name) + ",\"arguments\":\"";
        } else {
          *out += ",\"function\":{\"arguments\":\"";
        }
        append_json_escaped(*out, delta.text);
        *out += "\"}}]}";
      } else {
        *out += delta.kind == Kind::kReasoning ? "{\"reasoning_content\":\"" : "{\"content\":\"";
        append_json_escaped(*out, delta.text);
        *out += "\"}";
      }
    }
  }

  void open_chunk(std::string& out, size_t index) const {
    out += "data: ";
    out += head_;
    out += ",\"choices\":[{\"index\":";
    out += std::to_string(index);
  }

  void close_chunk(std::string& out, const Choice& choice, bool last, std::string_view logprobs) const {
    out += ",\"logprobs\":";
    out += logprobs.empty() ? "null" : logprobs;
    out += ",\"finish_reason\":";
    out += last ? "\"" + choice.finish_reason + "\"" : "null";
    out += "}]}\n\n";
  }

  void write_chunk(size_t index, const std::string& delta, const engine::Event& event) {
    std::string out;
    out.reserve(head_.size() + delta.size() + 256);
    if (request_.chat)
      write_chat_chunks(out, index, delta, event);
    else
      write_text_chunk(out, index, delta, event);
    if (!out.empty()) exchange_.write(out);
  }

  void write_chat_chunks(std::string& out, size_t index, std::string_view delta, const engine::Event& event) {
    Choice& choice = choices_[index];
    if (!choice.started) {
      choice.started = true;
      open_chunk(out, index);
      out += ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}";
      close_chunk(out, choice, false, {});
    }
    std::string logprobs;
    if (request_.fields.sampling.logprobs >= 0 && !event.logprobs.empty()) {
      logprobs = chat_logprobs(context_.model, event.logprobs, request_.fields.sampling.logprobs);
      if (delta.empty()) delta = "{}";
    }
    while (!delta.empty()) {
      const size_t end = delta.find('\n');
      open_chunk(out, index);
      out += ",\"delta\":";
      out += delta.substr(0, end);
      close_chunk(out, choice, false, logprobs);
      logprobs.clear();
      delta = end == std::string_view::npos ? std::string_view() : delta.substr(end + 1);
    }
    if (choice.finished) {
      open_chunk(out, index);
      out += ",\"delta\":{}";
      close_chunk(out, choice, true, {});
    }
  }

  void write_text_chunk(std::string& out, size_t index, std::string_view delta, engine::Event const& event) {
    Choice& choice = choices_[index];
    const GenerationFields& fields = request_.fields;
    const auto& prompt = request_.prompts[choice.prompt];
    if (delta.empty() && event.tokens.empty() && !choice.finished) return;
    const bool first = !choice.started;
    choice.started = true;
    open_chunk(out, index);
    out += ",\"text\":\"";
    if (first) append_json_escaped(out, choice.content);  // the echoed prompt
    out += delta;
    out += '"';
    if (fields.return_token_ids) {
      out += ",\"token_ids\":" + ids_json(event.tokens);
      if (first) out += ",\"prompt_token_ids\":" + ids_json(prompt.tokens);
    }
    std::string logprobs;
    if (fields.sampling.logprobs >= 0) {
      const bool echo = first && request_.echo;
      std::vector<runtime::TokenLogprobs> all;
      if (echo) all = choice.prompt_logprobs;
      all.insert(all.end(), event.logprobs.begin(), event.logprobs.end());
      logprobs = completion_logprobs(context_.model, echo ? &prompt.tokens.front() : nullptr, all,
                                     fields.sampling.logprobs, &choice.text_offset);
    }
    close_chunk(out, choice, choice.finished, logprobs);
  }

  std::string usage() const {
    int64_t prompt = 0, completion = 0, cached = 0;
    for (const auto& entry : request_.prompts) prompt += static_cast<int64_t>(entry.tokens.size());
    for (const Choice& choice : choices_) {
      completion += static_cast<int64_t>(choice.tokens.size());
      cached += choice.cached_tokens;
    }
    return "{\"prompt_tokens\":" + std::to_string(prompt) + ",\"completion_tokens\":" + std::to_string(completion) +
           ",\"total_tokens\":" + std::to_string(prompt + completion) +
           ",\"prompt_tokens_details\":{\"cached_tokens\":" + std::to_string(cached) + "}}";
  }

  void finish() {
    done_ = true;
    if (request_.fields.stream) {
      std::string out;
      if (request_.fields.include_usage) out = "data: " + head_ + ",\"choices\":[],\"usage\":" + usage() + "}\n\n";
      exchange_.write(out + "data: [DONE]\n\n");
      return exchange_.end_stream();
    }
    std::string out = head_ + ",\"choices\":[";
    for (size_t i = 0; i < choices_.size(); ++i) {
      if (i > 0) out += ',';
      out += "{\"index\":" + std::to_string(i) + (request_.chat ? message_json(choices_[i]) : text_json(choices_[i])) +
             ",\"finish_reason\":\"" + choices_[i].finish_reason + "\"}";
    }
    out += "],\"usage\":" + usage() + "}";
    exchange_.reply(200, "application/json", out);
  }

  std::string message_json(const Choice& choice) const {
    std::string out = ",\"message\":{\"role\":\"assistant\",\"content\":";
    out += choice.content.empty() && !choice.calls.empty() ? "null" : json_quoted(choice.content);
    if (!choice.reasoning.empty()) out += ",\"reasoning_content\":" + json_quoted(choice.reasoning);
    if (!choice.calls.empty()) {
      out += ",\"tool_calls\":[";
      for (size_t i = 0; i < choice.calls.size(); ++i) {
        const auto& call = choice.calls[i];
        if (i > 0) out += ',';
        out += "{\"id\":" + json_quoted(call.id) +
               ",\"type\":\"function\",\"function\":{\"name\":" + json_quoted(call.name) +
               ",\"arguments\":" + json_quoted(call.arguments) + "}}";
      }
      out += ']';
    }
    out += "},\"logprobs\":";
    const int32_t top = request_.fields.sampling.logprobs;
    return out + (top >= 0 ? chat_logprobs(context_.model, choice.logprobs, top) : "null");
  }

  std::string text_json(Choice& choice) const {
    const GenerationFields& fields = request_.fields;
    const auto& prompt = request_.prompts[choice.prompt];
    std::string out = ",\"text\":" + json_quoted(choice.content);
    if (fields.return_token_ids) {
      out += ",\"token_ids\":" + ids_json(choice.tokens) + ",\"prompt_token_ids\":" + ids_json(prompt.tokens);
    }
    out += ",\"logprobs\":";
    if (fields.sampling.logprobs < 0) return out + "null";
    std::vector<runtime::TokenLogprobs> all = choice.prompt_logprobs;
    all.insert(all.end(), choice.logprobs.begin(), choice.logprobs.end());
    return out + completion_logprobs(context_.model, request_.echo ? &prompt.tokens.front() : nullptr, all,
                                     fields.sampling.logprobs, &choice.text_offset);
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
  std::string id_;
  std::string head_;  // every chunk's and answer's start, up to the choices
  std::vector<Choice> choices_;
  size_t finished_ = 0;
  bool done_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_token_ = start_;
};

}  // namespace

void start_generation(ServerContext& context, GenerationRequest request, Exchange& exchange) {
  auto generation = std::make_shared<Generation>(context, std::move(request), exchange);
  if (const Status status = generation->submit(); !status.ok()) return reply_error(exchange, status);
  generation->begin();
  exchange.hold(std::move(generation));
}

}  // namespace tokenspeed::server
