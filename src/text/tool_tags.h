// The tags of the model's output language, recognised in text that may still be growing.
// Invariant: kYes and kNo stay true whatever text follows; kPartial means that more text is needed. This is what makes
// the parsers independent of chunking. Cost: each test looks at no more than a few hundred bytes.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace tokenspeed::text {

enum class TagMatch { kNo, kPartial, kYes };

inline constexpr std::string_view kThinkOpen = "<think>";
inline constexpr std::string_view kThinkClose = "</think>";
inline constexpr std::string_view kToolCallOpen = "<tool_call>";
inline constexpr std::string_view kToolCallClose = "</tool_call>";
inline constexpr std::string_view kFunctionOpen = "<function=";
inline constexpr std::string_view kFunctionClose = "</function>";
inline constexpr std::string_view kParameterOpen = "<parameter=";
inline constexpr std::string_view kParameterClose = "</parameter>";

// Bounds of the look-ahead: more whitespace between two tags, or a longer name, is not structure.
inline constexpr size_t kMaxTagGap = 256;
inline constexpr size_t kMaxTagName = 256;

// A tag with a name, e.g. `<function=NAME>`. `name` views the text matched; `end` is the offset after '>'.
struct NamedTag {
  TagMatch match = TagMatch::kNo;
  std::string_view name;
  size_t end = 0;
};

// Does `text` start with `tag`?
TagMatch match_tag(std::string_view text, std::string_view tag);
// Does `text` start with `opening` NAME `>`? NAME: 1 to kMaxTagName bytes, none of '<', '>', newline; trimmed, not
// blank.
NamedTag match_named_tag(std::string_view text, std::string_view opening);
// Does `text` start with `<tool_call>`, whitespace, `<function=NAME>`?
NamedTag match_call_opening(std::string_view text);
// Does `text` start with a `</function>` that closes: followed by `</tool_call>`, or by the next function or call?
TagMatch match_function_close(std::string_view text);
// Does `text` start with a `</parameter>` that closes: followed by a parameter, a closing `</function>`,
// `</tool_call>`?
TagMatch match_parameter_close(std::string_view text);
// The same where no more text will come: the end of the text is witness enough, and so is any `</function>`.
bool closes_value_at_end(std::string_view text);

bool is_space(char c);
std::string ascii_lower(std::string_view text);

// Passes text on, but keeps back whitespace at its end until the text after it decides its fate.
class SpaceHolder {
 public:
  // From here to the next non-space, newlines that come first are dropped.
  void drop_leading_newlines() { leading_ = true; }
  // Appends to `out` all of the text so far but the whitespace at its end.
  void add(std::string_view text, std::string* out);
  // Appends the whitespace held back.
  void flush(std::string* out);
  void drop() { space_.clear(); }

 private:
  void strip_leading();
  std::string space_;
  bool leading_ = false;
};

}  // namespace tokenspeed::text
