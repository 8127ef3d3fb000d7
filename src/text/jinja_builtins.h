// What templates may do with values besides syntax: operators, subscripts, filters, tests and methods of strings,
// lists and dicts, with Python's and Jinja2's meaning. All throw TemplateError (without a line).
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/jinja_budget.h"
#include "text/jinja_value.h"

namespace tokenspeed::text::jinja {

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument at `position` or named `name`; null when absent.
  const Value* find(size_t position, std::string_view name) const;
  // Throws when more than `most` arguments are there, or a named one is not among `names`.
  void check(std::string_view callee, size_t most, std::initializer_list<std::string_view> names = {}) const;
};

// Reports any use of an undefined value.
void require_defined(const Value& value);
// The elements a loop over `value` visits; throws when it has none to visit.
ListPointer iterate(const Value& value, Budget& budget);
bool contains(const Value& container, const Value& item, Budget& budget);
Value arithmetic(std::string_view op, const Value& left, const Value& right, Budget& budget);
Value negative(const Value& value);
// x[key] and x.name where no method has that name; a missing one gives undefined.
Value get_item(const Value& value, const Value& key);
// x[start:stop:step]; undefined or none parts are left out.
Value get_slice(const Value& value, const Value& start, const Value& stop, const Value& step, Budget& budget);

// True when values of this type have a method of that name, which then hides a key of the same name in x.name.
bool has_method(const Value& value, std::string_view name);
Value call_method(const Value& self, std::string_view name, const Arguments& arguments, Budget& budget);

Value apply_filter(std::string_view name, const Value& input, const Arguments& arguments, Budget& budget);
bool apply_test(std::string_view name, const Value& input, const Arguments& arguments, Budget& budget);

}  // namespace tokenspeed::text::jinja
