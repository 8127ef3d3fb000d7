#include "text/unicode.h"

#include <simdjson.h>
#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>

#include <algorithm>
#include <map>

namespace tokenspeed::text {
namespace {

constexpr size_t kCodePoints = 0x110000;
constexpr std::string_view kReplacement = "\xef\xbf\xbd";

CharClass class_of_category(UCharCategory category) {
  const uint32_t mask = U_MASK(category);
  if (mask & U_GC_L_MASK) return CharClass::kLetter;
  if (mask & U_GC_M_MASK) return CharClass::kMark;
  if (mask & U_GC_N_MASK) return CharClass::kNumber;
  return CharClass::kOther;
}

UBool fill_range(const void* context, UChar32 start, UChar32 limit, UCharCategory category) {
  auto* classes = static_cast<CharClass*>(const_cast<void*>(context));
  std::fill(classes + start, classes + limit, class_of_category(category));
  // White_Space lies in the separators and the controls only.
  if (U_MASK(category) & (U_GC_Z_MASK | U_GC_CC_MASK)) {
    for (UChar32 code = start; code < limit; ++code) {
      if (u_isUWhiteSpace(code)) classes[code] = CharClass::kSpace;
    }
  }
  return true;
}

}  // namespace

CharClassTable::CharClassTable() {
  std::vector<CharClass> classes(kCodePoints, CharClass::kOther);
  u_enumCharTypes(fill_range, classes.data());
  classes['\r'] = classes['\n'] = CharClass::kNewline;
  std::copy_n(classes.begin(), ascii_.size(), ascii_.begin());
  std::map<std::vector<CharClass>, uint16_t> known;
  for (size_t block = 0; block < blocks_.size(); ++block) {
    const std::vector<CharClass> row(classes.begin() + block * 256, classes.begin() + (block + 1) * 256);
    const auto [found, inserted] = known.try_emplace(row, static_cast<uint16_t>(known.size()));
    if (inserted) rows_.insert(rows_.end(), row.begin(), row.end());
    blocks_[block] = found->second;
  }
}

const CharClassTable& CharClassTable::instance() {
  static const CharClassTable table;
  return table;
}

Utf8Step utf8_step(std::string_view bytes) {
  const auto byte = [&](size_t index) { return static_cast<unsigned char>(bytes[index]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Kind::kValid, 1};
  if (lead < 0xc2 || lead > 0xf4) return {Utf8Kind::kInvalid, 1};
  const uint32_t length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  // Only the second byte's range depends on the lead: no overlong forms, surrogates or code points over 0x10ffff.
  unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  for (uint32_t index = 1; index < length; ++index) {
    if (index == bytes.size()) return {Utf8Kind::kIncomplete, index};
    if (byte(index) < low || byte(index) > high) return {Utf8Kind::kInvalid, index};
    low = 0x80;
    high = 0xbf;
  }
  return {Utf8Kind::kValid, length};
}

std::optional<size_t> find_invalid_utf8(std::string_view text) {
  if (simdjson::validate_utf8(text.data(), text.size())) return std::nullopt;
  for (size_t position = 0; position < text.size();) {
    const Utf8Step step = utf8_step(text.substr(position));
    if (step.kind != Utf8Kind::kValid) return position;
    position += step.length;
  }
  return std::nullopt;
}

size_t append_repaired_utf8(std::string_view bytes, bool hold_tail, std::string& out) {
  size_t position = 0;
  while (position < bytes.size()) {
    const Utf8Step step = utf8_step(bytes.substr(position));
    if (step.kind == Utf8Kind::kIncomplete && hold_tail) break;
    out += step.kind == Utf8Kind::kValid ? bytes.substr(position, step.length) : kReplacement;
    position += step.length;
  }
  return position;
}

Result<std::string_view> normalize_nfc(std::string_view text, std::string& buffer) {
  if (std::all_of(text.begin(), text.end(), [](char byte) { return static_cast<signed char>(byte) >= 0; })) return text;
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(error);
  const icu::StringPiece source(text.data(), static_cast<int32_t>(text.size()));
  if (U_SUCCESS(error) && nfc->isNormalizedUTF8(source, error) && U_SUCCESS(error)) return text;
  if (U_SUCCESS(error)) {
    buffer.clear();
    icu::StringByteSink<std::string> sink(&buffer);
    nfc->normalizeUTF8(0, source, sink, nullptr, error);
  }
  if (U_FAILURE(error)) return internal_error(std::string("NFC normalization failed in ICU: ") + u_errorName(error));
  return std::string_view(buffer);
}

bool is_white_space(char32_t code_point) { return u_isUWhiteSpace(static_cast<UChar32>(code_point)); }

bool is_word(char32_t code_point) {
  const auto code = static_cast<UChar32>(code_point);
  return u_isUAlphabetic(code) || u_hasBinaryProperty(code, UCHAR_JOIN_CONTROL) ||
         (U_GET_GC_MASK(code) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK));
}

}  // namespace tokenspeed::text
