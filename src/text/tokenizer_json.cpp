#include "text/tokenizer_json.h"

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <optional>

#include "text/unicode.h"

namespace tokenspeed::text {
namespace {

using simdjson::dom::array;
using simdjson::dom::element;
using simdjson::dom::object;

// Bounds the tables a lying file can ask for; the largest published vocabularies have some 260,000 tokens.
constexpr int64_t kMaxTokenId = (int64_t{1} << 22) - 1;

Status wrong(const std::string& place, std::string_view expected) {
  return data_loss(place + " is missing or not " + std::string(expected));
}

Status unsupported(const std::string& place, std::string_view value, std::string_view supported) {
  return unimplemented(place + " is \"" + std::string(value) + "\"; supported: " + std::string(supported));
}

template <typename T>
Result<T> get(object parent, const char* key, const std::string& place, std::string_view expected) {
  T value;
  if (parent[key].get(value) != simdjson::SUCCESS) return wrong(place + key, expected);
  return value;
}

Result<bool> get_flag(object parent, const char* key, bool absent, const std::string& place) {
  element value;
  if (parent[key].get(value) != simdjson::SUCCESS || value.is_null()) return absent;
  bool flag;
  if (value.get(flag) != simdjson::SUCCESS) return wrong(place + key, "true or false");
  return flag;
}

// Absent and null are the same to Hugging Face.
std::optional<element> get_optional(object parent, const char* key) {
  element value;
  if (parent[key].get(value) != simdjson::SUCCESS || value.is_null()) return std::nullopt;
  return value;
}

// The byte that each character of a byte-level vocabulary stands for: printable Latin-1 is itself, the other bytes in
// ascending order are U+0100 onwards.
std::array<int16_t, 0x144> make_byte_of_char() {
  std::array<int16_t, 0x144> bytes;
  bytes.fill(-1);
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    bytes[printable ? byte : next++] = static_cast<int16_t>(byte);
  }
  return bytes;
}

// The bytes a vocabulary string stands for; false when a character of it stands for none.
bool append_byte_level(std::string_view token, std::string& bytes) {
  static const std::array<int16_t, 0x144> byte_of_char = make_byte_of_char();
  for (size_t position = 0; position < token.size();) {
    const DecodedChar next = decode_valid_utf8(token, position);
    const int16_t byte = next.code_point < byte_of_char.size() ? byte_of_char[next.code_point] : int16_t{-1};
    if (byte < 0) return false;
    bytes += static_cast<char>(byte);
    position += next.length;
  }
  return true;
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<TokenKind> kinds;
  std::vector<int32_t> indexed;

  void make_room(int64_t id) {
    if (id < static_cast<int64_t>(tokens.size())) return;
    tokens.resize(id + 1);
    kinds.resize(id + 1, TokenKind::kUnknown);
  }
};

Status check_id(int64_t id, const std::string& place) {
  if (id >= 0 && id <= kMaxTokenId) return {};
  return data_loss(place + " has the id " + std::to_string(id) + ", not within 0 and " + std::to_string(kMaxTokenId));
}

Status read_vocabulary(object model, Vocabulary& vocabulary) {
  TS_ASSIGN_OR_RETURN(const object entries, get<object>(model, "vocab", "model.", "an object of token: id"));
  vocabulary.tokens.reserve(entries.size());
  for (const auto entry : entries) {
    const std::string place = "model.vocab[\"" + std::string(entry.key.substr(0, 80)) + "\"]";
    int64_t id;
    if (entry.value.get(id) != simdjson::SUCCESS) return wrong(place, "an integer");
    TS_RETURN_IF_ERROR(check_id(id, place));
    vocabulary.make_room(id);
    if (vocabulary.kinds[id] != TokenKind::kUnknown) {
      return data_loss(place + " has the id " + std::to_string(id) + ", which another token has too");
    }
    vocabulary.kinds[id] = TokenKind::kVocabulary;
    std::string& bytes = vocabulary.tokens[id];
    if (append_byte_level(entry.key, bytes) && !bytes.empty()) {
      vocabulary.indexed.push_back(static_cast<int32_t>(id));
    } else {
      // No byte sequence leads to this token; it is its own text when decoded.
      bytes = entry.key;
    }
  }
  return {};
}

Result<AddedToken> read_added_token(element source, const std::string& place) {
  object fields;
  if (source.get(fields) != simdjson::SUCCESS) return data_loss(place + "is not an object");
  AddedToken token;
  TS_ASSIGN_OR_RETURN(const int64_t id, get<int64_t>(fields, "id", place, "an integer"));
  TS_RETURN_IF_ERROR(check_id(id, place));
  token.id = static_cast<int32_t>(id);
  TS_ASSIGN_OR_RETURN(token.content, get<std::string_view>(fields, "content", place, "a string"));
  if (token.content.empty()) return data_loss(place + "content is empty");
  TS_ASSIGN_OR_RETURN(token.special, get_flag(fields, "special", false, place));
  TS_ASSIGN_OR_RETURN(token.normalized, get_flag(fields, "normalized", !token.special, place));
  TS_ASSIGN_OR_RETURN(token.single_word, get_flag(fields, "single_word", false, place));
  TS_ASSIGN_OR_RETURN(token.left_strip, get_flag(fields, "lstrip", false, place));
  TS_ASSIGN_OR_RETURN(token.right_strip, get_flag(fields, "rstrip", false, place));
  return token;
}

Status read_added_tokens(object root, Vocabulary& vocabulary, std::vector<AddedToken>& tokens) {
  const auto list = get_optional(root, "added_tokens");
  if (!list) return {};
  array sources;
  if (list->get(sources) != simdjson::SUCCESS) return data_loss("added_tokens is not an array");
  for (const element source : sources) {
    const std::string place = "added_tokens[" + std::to_string(tokens.size()) + "].";
    TS_ASSIGN_OR_RETURN(AddedToken token, read_added_token(source, place));
    vocabulary.make_room(token.id);
    TokenKind& kind = vocabulary.kinds[token.id];
    std::string& text = vocabulary.tokens[token.id];
    if (kind == TokenKind::kAdded || kind == TokenKind::kSpecial) {
      return data_loss(place + "id is " + std::to_string(token.id) + ", which another added token has too");
    }
    if (kind == TokenKind::kUnknown) {
      text = token.content;
    } else if (std::string bytes;
               text != token.content && !(append_byte_level(token.content, bytes) && bytes == text)) {
      return data_loss(place + "id is " + std::to_string(token.id) + ", which is another token in model.vocab");
    }
    kind = token.special ? TokenKind::kSpecial : TokenKind::kAdded;
    tokens.push_back(std::move(token));
  }
  return {};
}

// An added token that is also in the vocabulary must have the same id there, and no two the same text.
Status check_added_tokens(const TokenizerParts& parts) {
  std::vector<std::string_view> texts;
  for (const AddedToken& token : parts.added_tokens) {
    texts.push_back(token.content);
    std::string bytes;
    if (!append_byte_level(token.content, bytes)) continue;
    if (const auto id = parts.model.find(bytes); id && *id != token.id) {
      return data_loss("the added token \"" + token.content + "\" has the id " + std::to_string(token.id) + " but " +
                       std::to_string(*id) + " in model.vocab");
    }
  }
  std::sort(texts.begin(), texts.end());
  if (const auto twin = std::adjacent_find(texts.begin(), texts.end()); twin != texts.end()) {
    return data_loss("added_tokens holds \"" + std::string(*twin) + "\" twice");
  }
  return {};
}

// "a b" or ["a", "b"].
Status read_merge(element source, uint32_t rank, BpeModel& model) {
  const auto malformed = [&] {
    return data_loss("model.merges[" + std::to_string(rank) + "] is neither \"left right\" nor [\"left\", \"right\"]");
  };
  std::string_view left, right;
  if (std::string_view line; source.get(line) == simdjson::SUCCESS) {
    const size_t space = line.find(' ');
    if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) return malformed();
    left = line.substr(0, space);
    right = line.substr(space + 1);
  } else {
    array pair;
    if (source.get(pair) != simdjson::SUCCESS || pair.size() != 2 || pair.at(0).get(left) != simdjson::SUCCESS ||
        pair.at(1).get(right) != simdjson::SUCCESS) {
      return malformed();
    }
  }
  std::string left_bytes, right_bytes;
  if (left.empty() || right.empty() || !append_byte_level(left, left_bytes) || !append_byte_level(right, right_bytes)) {
    return malformed();
  }
  return model.add_merge(left_bytes, right_bytes, rank);
}

Status read_merges(object source, BpeModel& model) {
  TS_ASSIGN_OR_RETURN(const array merges, get<array>(source, "merges", "model.", "an array"));
  size_t count = 0;  // array::size() saturates at 2^24 - 1
  for ([[maybe_unused]] const element merge : merges) ++count;
  model.reserve_merges(count);
  uint32_t rank = 0;
  for (const element merge : merges) TS_RETURN_IF_ERROR(read_merge(merge, rank++, model));
  return {};
}

Status check_model(object model) {
  if (const auto type = get_optional(model, "type")) {
    std::string_view name;
    if (type->get(name) != simdjson::SUCCESS) return data_loss("model.type is not a string");
    if (name != "BPE") return unsupported("model.type", name, "BPE");
  }
  TS_ASSIGN_OR_RETURN(const bool byte_fallback, get_flag(model, "byte_fallback", false, "model."));
  if (byte_fallback) return unimplemented("model.byte_fallback is true; supported: byte-level vocabularies");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const auto affix = get_optional(model, key)) {
      if (std::string_view text; affix->get(text) != simdjson::SUCCESS || !text.empty()) {
        return unimplemented(std::string("model.") + key + " is set; supported: null or \"\"");
      }
    }
  }
  if (const auto dropout = get_optional(model, "dropout")) {
    if (double rate; dropout->get(rate) != simdjson::SUCCESS || rate != 0) {
      return unimplemented("model.dropout is set; supported: null or 0");
    }
  }
  return {};
}

Result<bool> read_normalizer(object root) {
  const auto normalizer = get_optional(root, "normalizer");
  if (!normalizer) return false;
  object fields;
  if (normalizer->get(fields) != simdjson::SUCCESS) return data_loss("normalizer is not an object");
  TS_ASSIGN_OR_RETURN(const std::string_view type, get<std::string_view>(fields, "type", "normalizer.", "a string"));
  if (type != "NFC") return unsupported("normalizer.type", type, "NFC, or no normalizer");
  return true;
}

Status check_decoder(object root) {
  TS_ASSIGN_OR_RETURN(const object decoder, get<object>(root, "decoder", "", "an object"));
  TS_ASSIGN_OR_RETURN(const std::string_view type, get<std::string_view>(decoder, "type", "decoder.", "a string"));
  if (type != "ByteLevel") return unsupported("decoder.type", type, "ByteLevel");
  return {};
}

Result<std::string_view> read_split(object split) {
  const std::string place = "pre_tokenizer's Split.";
  TS_ASSIGN_OR_RETURN(const std::string_view behavior, get<std::string_view>(split, "behavior", place, "a string"));
  if (behavior != "Isolated") return unsupported(place + "behavior", behavior, "Isolated");
  TS_ASSIGN_OR_RETURN(const bool invert, get_flag(split, "invert", false, place));
  if (invert) return unimplemented(place + "invert is true; supported: false");
  TS_ASSIGN_OR_RETURN(const object pattern, get<object>(split, "pattern", place, "an object"));
  return get<std::string_view>(pattern, "Regex", place + "pattern.", "a string");
}

// Returns whether ByteLevel brings GPT-2's pattern along.
Result<bool> read_byte_level(object byte_level) {
  const std::string place = "pre_tokenizer's ByteLevel.";
  TS_ASSIGN_OR_RETURN(const bool prefix_space, get_flag(byte_level, "add_prefix_space", true, place));
  if (prefix_space) return unimplemented(place + "add_prefix_space is true; supported: false");
  return get_flag(byte_level, "use_regex", true, place);
}

// [Split,] ByteLevel.
Result<Pretokenizer> read_steps(const std::vector<object>& steps) {
  std::optional<std::string_view> pattern;
  bool byte_level = false;
  for (const object step : steps) {
    TS_ASSIGN_OR_RETURN(const std::string_view type,
                        get<std::string_view>(step, "type", "pre_tokenizer's ", "a string"));
    if (type == "Split" && !pattern && !byte_level) {
      TS_ASSIGN_OR_RETURN(pattern, read_split(step));
    } else if (type == "ByteLevel" && !byte_level) {
      byte_level = true;
      TS_ASSIGN_OR_RETURN(const bool use_regex, read_byte_level(step));
      if (use_regex && pattern)
        return unimplemented("pre_tokenizer has a Split and ByteLevel.use_regex; supported: one");
      if (use_regex) pattern = kGpt2Pattern;
    } else {
      return unsupported("a pre_tokenizer step", type, "one Split, then ByteLevel");
    }
  }
  if (!byte_level) return unimplemented("pre_tokenizer has no ByteLevel; supported: one Split, then ByteLevel");
  if (!pattern) return Pretokenizer();
  return Pretokenizer::compile(*pattern);
}

Result<Pretokenizer> read_pretokenizer(object root) {
  TS_ASSIGN_OR_RETURN(const object top, get<object>(root, "pre_tokenizer", "", "an object"));
  TS_ASSIGN_OR_RETURN(const std::string_view type, get<std::string_view>(top, "type", "pre_tokenizer.", "a string"));
  std::vector<object> steps;
  if (type == "Sequence") {
    TS_ASSIGN_OR_RETURN(const array list, get<array>(top, "pretokenizers", "pre_tokenizer.", "an array"));
    for (const element step : list) {
      if (step.get(steps.emplace_back()) != simdjson::SUCCESS) {
        return data_loss("pre_tokenizer.pretokenizers holds something that is not an object");
      }
    }
  } else {
    steps.push_back(top);
  }
  return read_steps(steps);
}

}  // namespace

Result<TokenizerParts> parse_tokenizer_json(std::string_view json) {
  simdjson::dom::parser parser;
  object root;
  const auto error = parser.parse(json.data(), json.size()).get(root);
  if (error != simdjson::SUCCESS) {
    return data_loss(std::string("not a JSON object: ") + simdjson::error_message(error));
  }
  TS_ASSIGN_OR_RETURN(const object source, get<object>(root, "model", "", "an object"));
  TS_RETURN_IF_ERROR(check_model(source));
  TS_RETURN_IF_ERROR(check_decoder(root));
  TokenizerParts parts;
  TS_ASSIGN_OR_RETURN(parts.nfc, read_normalizer(root));
  TS_ASSIGN_OR_RETURN(parts.pretokenizer, read_pretokenizer(root));
  TS_ASSIGN_OR_RETURN(const bool ignore_merges, get_flag(source, "ignore_merges", false, "model."));
  Vocabulary vocabulary;
  TS_RETURN_IF_ERROR(read_vocabulary(source, vocabulary));
  TS_RETURN_IF_ERROR(read_added_tokens(root, vocabulary, parts.added_tokens));
  TS_ASSIGN_OR_RETURN(parts.model, BpeModel::create(std::move(vocabulary.tokens), vocabulary.indexed, ignore_merges));
  parts.kinds = std::move(vocabulary.kinds);
  TS_RETURN_IF_ERROR(check_added_tokens(parts));
  TS_RETURN_IF_ERROR(read_merges(source, parts.model));
  return parts;
}

}  // namespace tokenspeed::text
