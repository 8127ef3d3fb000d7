#include "server/logprob_json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "server/json_text.h"

namespace tokenspeed::server {
namespace {

std::string token_text(const ServedModel& model, int32_t id) {
  const std::string* bytes = model.tokenizer ? model.tokenizer->token_bytes(id) : nullptr;
  return bytes != nullptr ? *bytes : "token_id:" + std::to_string(id);
}

void append_number(std::string& out, float value) {
  if (!std::isfinite(value)) value = -9999.0f;  // JSON has no infinity
  char text[32];
  out.append(text, std::to_chars(text, text + sizeof(text), value).ptr);
}

void append_chat_token(std::string& out, const ServedModel& model, int32_t id, float logprob) {
  const std::string text = token_text(model, id);
  out += "{\"token\":" + json_quoted(text) + ",\"logprob\":";
  append_number(out, logprob);
  out += ",\"bytes\":[";
  for (size_t i = 0; i < text.size(); ++i) {
    if (i > 0) out += ',';
    out += std::to_string(static_cast<uint8_t>(text[i]));
  }
  out += ']';
}

size_t characters(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// JSON forbids nothing about equal keys, but readers keep one: distinct tokens with equal text keep the likelier.
std::string top_object(const ServedModel& model, const runtime::TokenLogprobs& token, int32_t top) {
  std::string out = "{";
  std::vector<std::string> seen;
  const auto add = [&](int32_t id, float logprob) {
    std::string key = json_quoted(token_text(model, id));
    if (std::find(seen.begin(), seen.end(), key) != seen.end()) return;
    if (!seen.empty()) out += ',';
    out += key + ':';
    append_number(out, logprob);
    seen.push_back(std::move(key));
  };
  for (size_t i = 0; i < token.top.size() && i < static_cast<size_t>(top); ++i)
    add(token.top[i].first, token.top[i].second);
  add(token.token, token.logprob);
  return out + '}';
}

}  // namespace

std::string chat_logprobs(const ServedModel& model, std::span<const runtime::TokenLogprobs> tokens, int32_t top) {
  std::string out = "{\"content\":[";
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += ',';
    append_chat_token(out, model, tokens[i].token, tokens[i].logprob);
    out += ",\"top_logprobs\":[";
    for (size_t k = 0; k < tokens[i].top.size() && k < static_cast<size_t>(top); ++k) {
      if (k > 0) out += ',';
      append_chat_token(out, model, tokens[i].top[k].first, tokens[i].top[k].second);
      out += '}';
    }
    out += "]}";
  }
  return out + "]}";
}

std::string completion_logprobs(const ServedModel& model, const int32_t* first,
                                std::span<const runtime::TokenLogprobs> tokens, int32_t top, size_t* offset) {
  std::string texts, values, tops, offsets;
  const auto add = [&](int32_t id, const runtime::TokenLogprobs* known) {
    const char* comma = texts.empty() ? "" : ",";
    const std::string text = token_text(model, id);
    texts += comma + json_quoted(text);
    values += comma;
    if (known != nullptr)
      append_number(values, known->logprob);
    else
      values += "null";
    tops += comma + (known != nullptr ? top_object(model, *known, top) : std::string("null"));
    offsets += comma + std::to_string(*offset);
    *offset += characters(text);
  };
  if (first != nullptr) add(*first, nullptr);
  for (const auto& token : tokens) add(token.token, &token);
  return "{\"text_offset\":[" + offsets + "],\"token_logprobs\":[" + values + "],\"tokens\":[" + texts +
         "],\"top_logprobs\":[" + tops + "]}";
}

}  // namespace tokenspeed::server
