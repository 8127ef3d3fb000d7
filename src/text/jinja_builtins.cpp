#include "text/jinja_builtins.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "text/jinja_json.h"
#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {
namespace {

using Names = std::initializer_list<std::string_view>;

bool among(Names names, std::string_view name) { return std::ranges::find(names, name) != names.end(); }

template <size_t kSize>
bool among(const std::string_view (&names)[kSize], std::string_view name) {
  return std::ranges::find(names, name) != std::end(names);
}

constexpr std::string_view kStringMethods[] = {"split",    "strip", "lstrip", "rstrip", "startswith",
                                               "endswith", "upper", "lower",  "title",  "capitalize",
                                               "replace",  "join",  "find",   "count",  "splitlines"};
constexpr std::string_view kDictMethods[] = {"get",      "items", "keys",    "values",     "copy",  "clear",
                                             "fromkeys", "pop",   "popitem", "setdefault", "update"};
constexpr std::string_view kListMethods[] = {"count",  "index", "append", "clear",   "copy", "extend",
                                             "insert", "pop",   "remove", "reverse", "sort"};

const std::string& require_text(const Value& value, std::string_view what) {
  require_defined(value);
  if (value.text() == nullptr) {
    throw TemplateError(std::string(what) + " must be a string, not '" + std::string(value.type_name()) + "'");
  }
  return *value.text();
}

// An optional string argument; null when absent or none.
const std::string* optional_text(const Arguments& arguments, size_t position, std::string_view name,
                                 std::string_view callee) {
  const Value* value = arguments.find(position, name);
  if (value == nullptr || value->is_none()) return nullptr;
  return &require_text(*value, "the argument of " + std::string(callee));
}

int64_t integer_argument(const Arguments& arguments, size_t position, std::string_view name, int64_t absent) {
  const Value* value = arguments.find(position, name);
  if (value == nullptr || value->is_none()) return absent;
  if (const int64_t* integer = value->as<int64_t>()) return *integer;
  throw TemplateError("an argument must be an integer, not '" + std::string(value->type_name()) + "'");
}

Value split(const std::string& text, const std::string* separator, int64_t most) {
  std::vector<Value> parts;
  const auto full = [&] { return most >= 0 && static_cast<int64_t>(parts.size()) >= most; };
  if (separator != nullptr) {
    if (separator->empty()) throw TemplateError("split() by an empty string");
    size_t start = 0;
    for (size_t end; !full() && (end = text.find(*separator, start)) != std::string::npos;) {
      parts.push_back(Value::string(text.substr(start, end - start)));
      start = end + separator->size();
    }
    parts.push_back(Value::string(text.substr(start)));
    return Value::list(std::move(parts));
  }
  std::string_view rest = strip_left(text);
  while (!rest.empty()) {
    size_t end = 0;
    while (end < rest.size() && !is_space(code_point(rest, end))) end += character_size(rest, end);
    if (full()) end = rest.size();
    parts.push_back(Value::string(std::string(rest.substr(0, end))));
    rest = strip_left(rest.substr(end));
  }
  return Value::list(std::move(parts));
}

Value split_lines(std::string_view text) {
  std::vector<Value> lines;
  size_t start = 0;
  for (size_t i = 0; i < text.size();) {
    const uint32_t code = code_point(text, i);
    const size_t at = i;
    i += character_size(text, i);
    const bool is_break =
        (code >= 10 && code <= 13) || (code >= 28 && code <= 30) || code == 0x85 || code == 0x2028 || code == 0x2029;
    if (!is_break) continue;
    lines.push_back(Value::string(std::string(text.substr(start, at - start))));
    if (code == '\r' && i < text.size() && text[i] == '\n') ++i;
    start = i;
  }
  if (start < text.size()) lines.push_back(Value::string(std::string(text.substr(start))));
  return Value::list(std::move(lines));
}

Value replace(const std::string& text, const std::string& from, const std::string& to, int64_t most, Budget& budget) {
  std::string out;
  const auto room = [&] { return most < 0 || most-- > 0; };
  size_t start = 0;
  if (from.empty()) {
    for (; start < text.size() && room(); start += character_size(text, start)) {
      budget.bytes(to.size());
      out += to;
      out += text.substr(start, character_size(text, start));
    }
    if (start == text.size() && room()) out += to;
    return Value::string(out + text.substr(start));
  }
  for (size_t end; (end = text.find(from, start)) != std::string::npos && room(); start = end + from.size()) {
    budget.bytes(to.size());
    out.append(text, start, end - start);
    out += to;
  }
  return Value::string(out.append(text, start));
}

Value join(const Value& input, const std::string& separator, bool strings_only, Budget& budget) {
  std::string out;
  const ListPointer list = iterate(input, budget);
  for (size_t i = 0; i < list->items.size(); ++i) {
    const Value& item = list->items[i];
    budget.bytes(item.weight() + separator.size());
    if (i > 0) out += separator;
    out += strings_only ? require_text(item, "an element of join()") : to_string(item);
  }
  return Value::string(std::move(out));
}

// Has the text this prefix (or suffix), or one of a tuple of them?
bool has_affix(const std::string& text, const Value& affix, bool prefix) {
  if (const auto* tuple = affix.as<Tuple>()) {
    return std::ranges::any_of(tuple->list->items, [&](const Value& item) { return has_affix(text, item, prefix); });
  }
  const std::string& part = require_text(affix, "the argument of startswith() or endswith()");
  return prefix ? text.starts_with(part) : text.ends_with(part);
}

int64_t count_text(const std::string& text, const std::string& part) {
  if (part.empty()) return static_cast<int64_t>(character_count(text)) + 1;
  int64_t count = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++count;
  return count;
}

const Value& required(const Arguments& arguments, size_t position, std::string_view callee) {
  if (position < arguments.positional.size()) return arguments.positional[position];
  throw TemplateError(std::string(callee) + "() lacks an argument");
}

Value string_method(const std::string& text, std::string_view name, const Arguments& arguments, Budget& budget) {
  if (name == "split") {
    arguments.check(name, 2, {"sep", "maxsplit"});
    budget.bytes(text.size() * 16);
    return split(text, optional_text(arguments, 0, "sep", name), integer_argument(arguments, 1, "maxsplit", -1));
  }
  if (name == "strip" || name == "lstrip" || name == "rstrip") {
    arguments.check(name, 1);
    const std::string* set = optional_text(arguments, 0, "", name);
    budget.bytes(text.size() * (set == nullptr ? 1 : 1 + set->size()));
    std::string_view result = text;
    if (name != "rstrip") result = strip_left(result, set);
    if (name != "lstrip") result = strip_right(result, set);
    return Value::string(std::string(result));
  }
  if (name == "replace") {
    arguments.check(name, 3);
    return replace(text, require_text(required(arguments, 0, name), "the argument of replace()"),
                   require_text(required(arguments, 1, name), "the argument of replace()"),
                   integer_argument(arguments, 2, "", -1), budget);
  }
  if (name == "startswith" || name == "endswith") {
    arguments.check(name, 1);
    return Value::boolean(has_affix(text, required(arguments, 0, name), name == "startswith"));
  }
  if (name == "join") {
    arguments.check(name, 1);
    return join(required(arguments, 0, name), text, true, budget);
  }
  if (name == "find" || name == "count") {
    arguments.check(name, 1);
    const std::string& part = require_text(required(arguments, 0, name), "the argument of find() or count()");
    if (name == "count") return Value::integer(count_text(text, part));
    const size_t at = text.find(part);
    if (at == std::string::npos) return Value::integer(-1);
    return Value::integer(static_cast<int64_t>(character_count(std::string_view(text).substr(0, at))));
  }
  arguments.check(name, 0);
  if (name == "upper") return Value::string(to_upper(text));
  if (name == "lower") return Value::string(to_lower(text));
  if (name == "capitalize") return Value::string(capitalize(text));
  if (name == "splitlines") {
    budget.bytes(text.size() * 16);
    return split_lines(text);
  }
  throw TemplateError("the string method '" + std::string(name) + "' is not supported in chat templates");
}

Value dict_items(const Dict& dict) {
  std::vector<Value> items;
  for (const auto& [key, value] : dict.entries) items.push_back(Value::tuple({Value::string(key), value}));
  return Value::list(std::move(items));
}

Value dict_method(const Dict& dict, std::string_view name, const Arguments& arguments, Budget& budget) {
  budget.bytes(dict.entries.size() * 64);
  if (name == "get") {
    arguments.check(name, 2);
    const Value& key = required(arguments, 0, name);
    if (const Value* found = key.text() == nullptr ? nullptr : dict.find(*key.text())) return *found;
    return arguments.positional.size() > 1 ? arguments.positional[1] : Value::none();
  }
  arguments.check(name, 0);
  if (name == "items") return dict_items(dict);
  std::vector<Value> parts;
  for (const auto& [key, value] : dict.entries) parts.push_back(name == "keys" ? Value::string(key) : value);
  if (name == "keys" || name == "values") return Value::list(std::move(parts));
  throw TemplateError("the dict method '" + std::string(name) + "' changes the dict; chat templates may not");
}

Value list_method(const std::vector<Value>& items, std::string_view name, const Arguments& arguments) {
  if (name != "count" && name != "index") {
    throw TemplateError("the list method '" + std::string(name) + "' changes the list; chat templates may not");
  }
  arguments.check(name, 1);
  const Value& wanted = required(arguments, 0, name);
  const auto same = [&](const Value& item) { return equal(item, wanted); };
  if (name == "count") return Value::integer(std::ranges::count_if(items, same));
  const auto found = std::ranges::find_if(items, same);
  if (found == items.end()) throw TemplateError("index(): the element is not in the list");
  return Value::integer(found - items.begin());
}

Value length(const Value& input) {
  if (const std::string* text = input.text()) return Value::integer(static_cast<int64_t>(character_count(*text)));
  if (const auto* items = input.items()) return Value::integer(static_cast<int64_t>(items->size()));
  if (const Dict* dict = input.dict()) return Value::integer(static_cast<int64_t>(dict->entries.size()));
  if (input.is_undefined()) return Value::integer(0);
  throw TemplateError("a value of the type '" + std::string(input.type_name()) + "' has no length");
}

std::optional<double> parse_float(std::string_view text) {
  text = strip_right(strip_left(text));
  if (text.starts_with('+')) text.remove_prefix(1);
  double value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || parsed.ec != std::errc() || parsed.ptr != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<double> numeric(const Value& value) {
  if (const double* number = value.as<double>()) return *number;
  if (const int64_t* integer = value.as<int64_t>()) return static_cast<double>(*integer);
  if (const bool* boolean = value.as<bool>()) return *boolean ? 1 : 0;
  if (const std::string* text = value.text()) return parse_float(*text);
  return std::nullopt;
}

Value int_filter(const Value& input, const Arguments& arguments) {
  const Value* fallback = arguments.find(0, "default");
  if (input.as<int64_t>() != nullptr || input.as<BigInteger>() != nullptr) return input;
  if (const std::string* text = input.text()) {
    std::string_view digits = strip_right(strip_left(*text));
    if (digits.starts_with('+')) digits.remove_prefix(1);
    int64_t value = 0;
    const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (!digits.empty() && parsed.ec == std::errc() && parsed.ptr == digits.data() + digits.size())
      return Value::integer(value);
  }
  const auto number = numeric(input);
  if (number && std::abs(*number) < 9e18) return Value::integer(static_cast<int64_t>(*number));
  require_defined(input);
  return fallback == nullptr ? Value::integer(0) : *fallback;
}

Value absolute(const Value& input) {
  require_defined(input);
  if (const double* number = input.as<double>()) return Value::number(std::abs(*number));
  if (!input.is_number()) throw TemplateError("abs needs a number, not '" + std::string(input.type_name()) + "'");
  return compare(input, Value::integer(0)) < 0 ? negative(input)
         : input.as<bool>() != nullptr         ? negative(negative(input))
                                               : input;
}

Value reversed(const Value& input, Budget& budget) {
  const ListPointer list = iterate(input, budget);
  std::vector<Value> items(list->items.rbegin(), list->items.rend());
  budget.bytes(items.size() * 32);
  if (input.text() == nullptr) return Value::list(std::move(items));
  return join(Value::list(std::move(items)), "", true, budget);
}

Value end_of(const Value& input, bool first, Budget& budget) {
  const ListPointer list = iterate(input, budget);
  if (list->items.empty()) return Value::undefined("the sequence is empty: it has no first or last item");
  return first ? list->items.front() : list->items.back();
}

Value json_filter(const Value& input, const Arguments& arguments) {
  arguments.check("tojson", 2, {"ensure_ascii", "indent", "separators", "sort_keys"});
  const Value* ascii = arguments.find(0, "ensure_ascii");
  if ((ascii != nullptr && ascii->truthy()) || arguments.find(9, "separators") != nullptr) {
    throw TemplateError("tojson with ensure_ascii or separators is not supported in chat templates");
  }
  const int64_t indent = integer_argument(arguments, 1, "indent", -1);
  const Value* sort = arguments.find(9, "sort_keys");
  return Value::string(
      write_json(input, static_cast<int>(std::clamp<int64_t>(indent, -1, 16)), sort != nullptr && sort->truthy()));
}

Value default_filter(const Value& input, const Arguments& arguments) {
  arguments.check("default", 2, {"default_value", "boolean"});
  const Value* fallback = arguments.find(0, "default_value");
  const Value* falsy_too = arguments.find(1, "boolean");
  const bool absent = input.is_undefined() || (falsy_too != nullptr && falsy_too->truthy() && !input.truthy());
  if (!absent) return input;
  return fallback == nullptr ? Value::string("") : *fallback;
}

Value text_filter(std::string_view name, const Value& input, const Arguments& arguments, Budget& budget) {
  const std::string text = to_string(input);
  if (name == "trim") {
    arguments.check(name, 1, {"chars"});
    const std::string* set = optional_text(arguments, 0, "chars", name);
    if (set != nullptr) budget.bytes(text.size() * (1 + set->size()));
    return Value::string(std::string(strip_right(strip_left(text, set), set)));
  }
  if (name == "replace") return string_method(text, "replace", arguments, budget);
  arguments.check(name, 0);
  if (name == "upper") return Value::string(to_upper(text));
  if (name == "lower") return Value::string(to_lower(text));
  if (name == "capitalize") return Value::string(capitalize(text));
  if (name == "title") return Value::string(title(text));
  return Value::string(text);  // string, safe
}

}  // namespace

const Value* Arguments::find(size_t position, std::string_view name) const {
  if (position < positional.size()) return &positional[position];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

void Arguments::check(std::string_view callee, size_t most, std::initializer_list<std::string_view> names) const {
  if (positional.size() > most) {
    throw TemplateError("'" + std::string(callee) + "' takes at most " + std::to_string(most) + " arguments");
  }
  for (const auto& [name, value] : named) {
    if (!among(names, name)) throw TemplateError("'" + std::string(callee) + "' has no argument '" + name + "'");
  }
}

bool has_method(const Value& value, std::string_view name) {
  if (value.text() != nullptr) return among(kStringMethods, name);
  if (value.dict() != nullptr) return among(kDictMethods, name);
  return value.items() != nullptr && among(kListMethods, name);
}

Value call_method(const Value& self, std::string_view name, const Arguments& arguments, Budget& budget) {
  budget.bytes(self.weight());
  if (const std::string* text = self.text()) {
    return name == "title" ? Value::string(title(*text)) : string_method(*text, name, arguments, budget);
  }
  if (const Dict* dict = self.dict()) return dict_method(*dict, name, arguments, budget);
  return list_method(*self.items(), name, arguments);
}

Value apply_filter(std::string_view name, const Value& input, const Arguments& arguments, Budget& budget) {
  budget.bytes(input.weight());
  if (among({"trim", "string", "safe", "upper", "lower", "replace", "capitalize", "title"}, name)) {
    if (input.text() != nullptr && (name == "string" || name == "safe")) return input;
    return text_filter(name, input, arguments, budget);
  }
  if (name == "tojson") return json_filter(input, arguments);
  if (name == "default" || name == "d") return default_filter(input, arguments);
  if (name == "join") {
    arguments.check(name, 1, {"d"});
    const Value* separator = arguments.find(0, "d");
    return join(input, separator == nullptr ? "" : to_string(*separator), false, budget);
  }
  if (name == "int") {
    arguments.check(name, 1, {"default"});
    return int_filter(input, arguments);
  }
  if (name == "float") {
    arguments.check(name, 1, {"default"});
    const Value* fallback = arguments.find(0, "default");
    if (const auto number = numeric(input)) return Value::number(*number);
    return fallback == nullptr ? Value::number(0) : *fallback;
  }
  arguments.check(name, 0);
  if (name == "length" || name == "count") return length(input);
  if (name == "first" || name == "last") return end_of(input, name == "first", budget);
  if (name == "list") return Value::list(iterate(input, budget)->items);
  if (name == "reverse") return reversed(input, budget);
  if (name == "abs") return absolute(input);
  if (name == "items") {
    if (input.is_undefined()) return Value::list({});
    if (input.dict() == nullptr) {
      throw TemplateError("items needs a mapping, not '" + std::string(input.type_name()) + "'");
    }
    return dict_items(*input.dict());
  }
  throw TemplateError("the filter '" + std::string(name) + "' is unknown or not supported in chat templates");
}

bool apply_test(std::string_view name, const Value& input, const Arguments& arguments, Budget& budget) {
  if (among({"eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan", "ge", "in", "divisibleby", "sameas"},
            name)) {
    arguments.check(name, 1);
    const Value& other = required(arguments, 0, name);
    budget.bytes(input.weight() + other.weight());
    if (name == "eq" || name == "equalto") return equal(input, other);
    if (name == "ne") return !equal(input, other);
    if (name == "in") return contains(other, input, budget);
    if (name == "divisibleby") return equal(arithmetic("%", input, other, budget), Value::integer(0));
    if (name == "sameas") return input.type_name() == other.type_name() && equal(input, other);
    const int order = compare(input, other);
    if (name == "lt" || name == "lessthan") return order == -1;
    if (name == "le") return order == -1 || order == 0;
    if (name == "ge") return order == 1 || order == 0;
    return order == 1;
  }
  arguments.check(name, 0);
  if (name == "defined") return !input.is_undefined();
  if (name == "undefined") return input.is_undefined();
  if (name == "none") return input.is_none();
  if (name == "string") return input.is_string();
  if (name == "mapping") return input.dict() != nullptr;
  if (name == "boolean") return input.as<bool>() != nullptr;
  if (name == "true") return input.as<bool>() != nullptr && *input.as<bool>();
  if (name == "false") return input.as<bool>() != nullptr && !*input.as<bool>();
  if (name == "integer") return input.as<int64_t>() != nullptr || input.as<BigInteger>() != nullptr;
  if (name == "float") return input.as<double>() != nullptr;
  if (name == "number") return input.is_number();
  const bool has_length =
      input.is_string() || input.items() != nullptr || input.dict() != nullptr || input.is_undefined();
  if (name == "iterable") return has_length || input.as<std::shared_ptr<LoopState>>() != nullptr;
  if (name == "sequence") return has_length;
  if (name == "callable") {
    return input.as<const Macro*>() != nullptr || input.as<std::shared_ptr<const Method>>() != nullptr ||
           input.as<GlobalFunction>() != nullptr;
  }
  if (name == "odd" || name == "even") {
    const bool even = equal(arithmetic("%", input, Value::integer(2), budget), Value::integer(0));
    return even == (name == "even");
  }
  if (name == "lower" || name == "upper") {
    const std::string text = to_string(input);
    const std::string upper = to_upper(text), lower = to_lower(text);
    return upper != lower && text == (name == "lower" ? lower : upper);
  }
  throw TemplateError("the test '" + std::string(name) + "' is unknown or not supported in chat templates");
}

}  // namespace tokenspeed::text::jinja
