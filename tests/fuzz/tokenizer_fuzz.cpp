// Any bytes as a tokenizer.json, as a text and as token ids, by the first byte of the input. A file that is accepted
// must encode; a text must come back as its NFC; streamed pieces must be the whole; the scanners must be their regexes.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "text/detokenizer.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

using namespace tokenspeed::text;

void require(bool condition) {
  if (!condition) std::abort();
}

const Tokenizer& demo() {
  static const Tokenizer tokenizer = Tokenizer::load(std::string(TOKENSPEED_SOURCE_DIR) + "/models/demo").value();
  return tokenizer;
}

void as_file(std::string_view json) {
  const auto tokenizer = Tokenizer::parse(json);
  if (!tokenizer.ok()) return;
  const auto ids = tokenizer->encode("It's 12 caf\u00e9s,\n\n  <|im_end|> \u65e5\u672c");
  // Only a Split pattern that gives up may refuse a text.
  require(ids.ok() || ids.status().code() == tokenspeed::StatusCode::kInvalidArgument);
  if (!ids.ok()) return;
  for (const int32_t id : *ids) require(id >= 0 && id < tokenizer->vocabulary_size());
  (void)tokenizer->decode(*ids, true);
}

void expect_scanner(std::string_view text, const Pretokenizer& regex,
                    void (*scanner)(std::string_view, std::vector<uint32_t>&)) {
  std::vector<uint32_t> expected, actual;
  require(regex.split(text, expected).ok());
  scanner(text, actual);
  require(actual == expected);
}

// ICU may know newer letters than PCRE2: the scanners are compared where the two have agreed for long.
bool known_to_both(std::string_view text) {
  for (size_t position = 0; position < text.size();) {
    const DecodedChar next = decode_valid_utf8(text, position);
    if (next.code_point > 0x6ff && next.code_point != 0x3000 && next.code_point != 0x180e) return false;
    position += next.length;
  }
  return true;
}

void as_text(std::string_view text) {
  static const Pretokenizer qwen2 = Pretokenizer::compile_regex(kQwen2Pattern).value();
  static const Pretokenizer qwen35 = Pretokenizer::compile_regex(kQwen35Pattern).value();
  const auto ids = demo().encode(text);
  require(ids.ok() != find_invalid_utf8(text).has_value());
  if (!ids.ok()) return;
  std::string buffer;
  const std::string whole = demo().decode(*ids, false);
  // Added tokens are cut out before normalization, so that only their neighbours are normalized.
  if (text.find('<') == std::string_view::npos) require(whole == normalize_nfc(text, buffer).value());
  if (known_to_both(text)) {
    expect_scanner(text, qwen2, split_qwen2);
    expect_scanner(text, qwen35, split_qwen35);
  }
}

void as_ids(std::string_view bytes) {
  std::vector<int32_t> ids;
  for (; bytes.size() >= 2; bytes.remove_prefix(2)) {
    int16_t id;
    std::memcpy(&id, bytes.data(), 2);
    ids.push_back(id);
  }
  for (const bool skip : {false, true}) {
    StreamingDetokenizer detokenizer(demo(), skip);
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string piece = detokenizer.push(id);
      require(!find_invalid_utf8(piece));
      streamed += piece;
    }
    require(streamed + detokenizer.finish() == demo().decode(ids, skip));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 3) {
    case 0:
      as_file(rest);
      break;
    case 1:
      as_text(rest);
      break;
    default:
      as_ids(rest);
  }
  return 0;
}
