#include "text/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/unicode.h"

namespace tokenspeed::text {

const std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string_view kQwen35Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string_view kGpt2Pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

template <auto kFree>
struct Deleter {
  template <typename T>
  void operator()(T* pointer) const {
    kFree(pointer);
  }
};
using Code = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;
using JitStack = std::unique_ptr<pcre2_jit_stack, Deleter<pcre2_jit_stack_free>>;

constexpr size_t kJitStackStart = size_t{32} << 10;
constexpr size_t kJitStackLimit = size_t{8} << 20;

// PCRE2's \s takes in U+180E, which is no White_Space any more.
std::string with_white_space_property(std::string_view pattern) {
  std::string result;
  for (size_t index = 0; index < pattern.size(); ++index) {
    if (pattern[index] != '\\' || index + 1 == pattern.size()) {
      result += pattern[index];
      continue;
    }
    ++index;
    if (pattern[index] == 's') {
      result += "\\p{White_Space}";
    } else if (pattern[index] == 'S') {
      result += "\\P{White_Space}";
    } else {
      (result += '\\') += pattern[index];
    }
  }
  return result;
}

std::string error_text(int code) {
  unsigned char buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct Pretokenizer::Regex {
  Code code;
  Status split(std::string_view text, std::vector<uint32_t>& ends) const;
};

Pretokenizer::Pretokenizer() : kind_(Kind::kWhole) {}
Pretokenizer::~Pretokenizer() = default;
Pretokenizer::Pretokenizer(Pretokenizer&&) noexcept = default;
Pretokenizer& Pretokenizer::operator=(Pretokenizer&&) noexcept = default;

Result<Pretokenizer> Pretokenizer::compile(std::string_view pattern) {
  if (pattern != kQwen2Pattern && pattern != kQwen35Pattern) return compile_regex(pattern);
  Pretokenizer result;
  result.kind_ = pattern == kQwen2Pattern ? Kind::kQwen2 : Kind::kQwen35;
  return result;
}

Result<Pretokenizer> Pretokenizer::compile_regex(std::string_view pattern) {
  const std::string source = with_white_space_property(pattern);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) return internal_error("out of memory while compiling the Split pattern");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  // Oniguruma's ^ and $, which these files are written for, match at every line.
  Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error, &offset,
                          context.get()));
  if (!code) {
    return data_loss("the Split pattern does not compile at offset " + std::to_string(offset) + " of \"" +
                     source.substr(0, 200) + "\": " + error_text(error));
  }
  // Without JIT (a machine that forbids executable pages) the interpreter gives the same matches, slower.
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  Pretokenizer result;
  result.kind_ = Kind::kRegex;
  result.regex_ = std::make_unique<Regex>(Regex{std::move(code)});
  return result;
}

Status Pretokenizer::Regex::split(std::string_view text, std::vector<uint32_t>& ends) const {
  const MatchData data(pcre2_match_data_create_from_pattern(code.get(), nullptr));
  const MatchContext context(pcre2_match_context_create(nullptr));
  const JitStack stack(pcre2_jit_stack_create(kJitStackStart, kJitStackLimit, nullptr));
  if (!data || !context) return internal_error("out of memory while splitting text");
  if (stack) pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
  size_t word_start = 0;
  const auto end_word = [&](size_t end) {
    if (end > word_start) ends.push_back(static_cast<uint32_t>(end));
    word_start = end;
  };
  for (size_t position = 0; position < text.size();) {
    const int count = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), position,
                                  PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0) {
      return invalid_argument("the Split pattern of tokenizer.json gives up on this text at byte " +
                              std::to_string(position) + ": " + error_text(count) + "; send a shorter text");
    }
    const size_t* match = pcre2_get_ovector_pointer(data.get());
    if (match[0] > match[1] || match[1] < position) break;  // \K inside a lookaround; nothing sensible to isolate
    end_word(match[0] < word_start ? word_start : match[0]);
    end_word(match[1]);
    position = match[1];
    // An empty match ends a word but takes no character.
    if (match[0] == match[1] && position < text.size()) position += decode_valid_utf8(text, position).length;
  }
  end_word(text.size());
  return {};
}

Status Pretokenizer::split(std::string_view text, std::vector<uint32_t>& ends) const {
  switch (kind_) {
    case Kind::kWhole:
      if (!text.empty()) ends.push_back(static_cast<uint32_t>(text.size()));
      return {};
    case Kind::kQwen2:
      split_qwen2(text, ends);
      return {};
    case Kind::kQwen35:
      split_qwen35(text, ends);
      return {};
    case Kind::kRegex:
      return regex_->split(text, ends);
  }
  return {};
}

}  // namespace tokenspeed::text
