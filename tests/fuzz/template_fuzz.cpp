// Any bytes as a chat template: parsing and rendering must neither crash nor hang.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "text/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto chat_template =
      tokenspeed::text::ChatTemplate::parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!chat_template.ok()) return 0;
  (void)chat_template->render(
      R"({"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": ["b", 1.5, null]}],
          "tools": [{"type": "function"}], "x": {"k": [1, {"n": -2}], "s": " p q "}})");
  return 0;
}
