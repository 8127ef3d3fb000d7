#include "text/tokenizer.h"

#include <exception>
#include <unordered_map>
#include <utility>

#include "base/mapped_file.h"
#include "text/tokenizer_added.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"

namespace tokenspeed::text {
namespace {

constexpr const char* kTokenizerFile = "tokenizer.json";

// NFC may triple the bytes, and ICU counts them in 31 bits.
constexpr size_t kMaxTextBytes = size_t{1} << 29;

}  // namespace

struct Tokenizer::Data {
  TokenizerParts parts;
  AddedTokenMatcher before_normalization;
  AddedTokenMatcher after_normalization;
  std::unordered_map<std::string_view, int32_t> added_ids;  // keys live in parts.added_tokens

  Status add_tokens();
  Status encode_text(std::string_view text, std::vector<int32_t>& ids) const;
  Status encode_piece(std::string_view piece, EncodeOptions options, std::vector<int32_t>& ids) const;
};

Tokenizer::Tokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Status Tokenizer::Data::add_tokens() {
  for (const AddedToken& token : parts.added_tokens) {
    added_ids.emplace(token.content, token.id);
    if (!token.normalized) {
      before_normalization.add(token, token.content);
      continue;
    }
    std::string buffer;
    std::string_view pattern = token.content;
    if (parts.nfc) {
      TS_ASSIGN_OR_RETURN(pattern, normalize_nfc(token.content, buffer));
    }
    after_normalization.add(token, pattern);
  }
  return {};
}

Result<Tokenizer> Tokenizer::load(const Directory& directory) {
  TS_ASSIGN_OR_RETURN(const std::string json, directory.read(kTokenizerFile));
  Result<Tokenizer> tokenizer = parse(json);
  if (!tokenizer.ok()) return Status(tokenizer.status()).with_context(directory.path_of(kTokenizerFile));
  return tokenizer;
}

Result<Tokenizer> Tokenizer::parse(std::string_view json) {
  try {
    auto data = std::make_unique<Data>();
    TS_ASSIGN_OR_RETURN(data->parts, parse_tokenizer_json(json));
    TS_RETURN_IF_ERROR(data->add_tokens());
    return Tokenizer(std::move(data));
  } catch (const std::exception& error) {
    return internal_error(std::string("reading the tokenizer failed: ") + error.what());
  }
}

Status Tokenizer::Data::encode_text(std::string_view text, std::vector<int32_t>& ids) const {
  std::vector<uint32_t> ends;
  ends.reserve(text.size() / 4);
  TS_RETURN_IF_ERROR(parts.pretokenizer.split(text, ends));
  uint32_t start = 0;
  for (const uint32_t end : ends) {
    parts.model.encode_word(text.substr(start, end - start), ids);
    start = end;
  }
  return {};
}

Status Tokenizer::Data::encode_piece(std::string_view piece, EncodeOptions options, std::vector<int32_t>& ids) const {
  std::string buffer;
  if (parts.nfc) {
    TS_ASSIGN_OR_RETURN(piece, normalize_nfc(piece, buffer));
  }
  std::vector<TextPiece> pieces;
  after_normalization.split(piece, options.parse_special_tokens, pieces);
  for (const TextPiece& part : pieces) {
    if (part.id >= 0) {
      ids.push_back(part.id);
    } else {
      TS_RETURN_IF_ERROR(encode_text(part.text, ids));
    }
  }
  return {};
}

Result<std::vector<int32_t>> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes) {
    return invalid_argument("the text has " + std::to_string(text.size()) + " bytes, over the limit of " +
                            std::to_string(kMaxTextBytes) + "; send it in parts");
  }
  if (const auto offset = find_invalid_utf8(text)) {
    return invalid_argument("the text is not valid UTF-8 at byte " + std::to_string(*offset) + "; send UTF-8");
  }
  std::vector<TextPiece> pieces;
  data_->before_normalization.split(text, options.parse_special_tokens, pieces);
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3);
  for (const TextPiece& piece : pieces) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
    } else {
      TS_RETURN_IF_ERROR(data_->encode_piece(piece.text, options, ids));
    }
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (skip_special_tokens && is_special(id)) continue;
    if (const std::string* token = token_bytes(id)) bytes += *token;
  }
  if (!find_invalid_utf8(bytes)) return bytes;
  std::string text;
  append_repaired_utf8(bytes, /*hold_tail=*/false, text);
  return text;
}

const std::string* Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || id >= vocabulary_size() || data_->parts.kinds[id] == TokenKind::kUnknown) return nullptr;
  return &data_->parts.model.tokens()[id];
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocabulary_size() && data_->parts.kinds[id] == TokenKind::kSpecial;
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token_text) const {
  const auto added = data_->added_ids.find(token_text);
  if (added != data_->added_ids.end()) return added->second;
  return data_->parts.model.find(token_text);
}

int32_t Tokenizer::vocabulary_size() const { return static_cast<int32_t>(data_->parts.kinds.size()); }

}  // namespace tokenspeed::text
