// The interpreter's own objects that template values point at: namespaces, macros with the scope they were defined in,
// and the state of a running loop. They live as long as one rendering.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

struct MacroNode;

// Variables of the template body, of one pass of a loop, or of one macro call. Few per scope: searched in order.
struct Scope {
  Scope* parent = nullptr;
  bool captured = false;  // a macro was defined in it or below: it must stay until the rendering ends
  std::vector<std::pair<std::string, Value>> variables;

  const Value* find_own(std::string_view name) const {
    for (const auto& [key, value] : variables) {
      if (key == name) return &value;
    }
    return nullptr;
  }
  void set(std::string_view name, Value value) {
    for (auto& [key, present] : variables) {
      if (key == name) {
        present = std::move(value);
        return;
      }
    }
    variables.emplace_back(std::string(name), std::move(value));
  }
};

struct Namespace {
  Dict fields;
};

struct Macro {
  const MacroNode* node;
  Scope* scope;
};

struct LoopState {
  ListPointer items;
  size_t index = 0;
  int depth = 1;  // as a value
};

}  // namespace tokenspeed::text::jinja
