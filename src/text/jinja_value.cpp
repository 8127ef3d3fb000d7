#include "text/jinja_value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "text/jinja_objects.h"
#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {
namespace {

constexpr size_t kIndexedDictSize = 16;

void check_weight(uint64_t weight) {
  if (weight > kMaximumWeight)
    throw TemplateError("a value is larger than " + std::to_string(kMaximumWeight) + " bytes");
}

int checked_depth(int depth) {
  if (depth > kMaximumDepth) {
    throw TemplateError("values nest deeper than " + std::to_string(kMaximumDepth) + " levels");
  }
  return depth;
}

ListPointer make_list(std::vector<Value> items) {
  int depth = 0;
  auto list = std::make_shared<List>();
  for (const Value& item : items) {
    depth = std::max(depth, item.depth());
    list->weight += item.weight();
    check_weight(list->weight);
  }
  list->depth = checked_depth(depth + 1);
  list->items = std::move(items);
  return list;
}

// Numbers of all kinds for comparison. Long double holds every int64 exactly.
long double numeric(const Value& value) {
  if (const bool* boolean = value.as<bool>()) return *boolean ? 1 : 0;
  if (const int64_t* integer = value.as<int64_t>()) return *integer;
  if (const double* number = value.as<double>()) return *number;
  const std::string& text = *value.as<BigInteger>()->text;
  const bool negative = text[0] == '-';
  double result = HUGE_VAL;
  const auto parsed = std::from_chars(text.data() + negative, text.data() + text.size(), result);
  if (parsed.ec != std::errc()) result = HUGE_VAL;
  return negative ? -result : result;
}

int sign(bool less, bool greater) { return less ? -1 : greater ? 1 : 0; }

int compare_numbers(const Value& left, const Value& right) {
  const auto* big_left = left.as<BigInteger>();
  const auto* big_right = right.as<BigInteger>();
  if (big_left != nullptr && big_right != nullptr) {
    const std::string &a = *big_left->text, &b = *big_right->text;
    if (a == b) return 0;
    const bool a_negative = a[0] == '-', b_negative = b[0] == '-';
    if (a_negative != b_negative) return a_negative ? -1 : 1;
    const bool smaller = a.size() != b.size() ? a.size() < b.size() : a < b;
    return smaller != a_negative ? -1 : 1;
  }
  const long double a = numeric(left), b = numeric(right);
  if (std::isnan(a) || std::isnan(b)) return 2;
  return sign(a<b, a> b);
}

std::string join_repr(const std::vector<Value>& items) {
  std::string out;
  for (const Value& item : items) {
    if (&item != items.data()) out += ", ";
    out += to_repr(item);
  }
  return out;
}

std::string dict_repr(const Dict& dict) {
  std::string out = "{";
  for (const auto& [key, item] : dict.entries) {
    if (out.size() > 1) out += ", ";
    out += quote(key) + ": " + to_repr(item);
  }
  return out + "}";
}

}  // namespace

Value Value::integer_text(std::string text) {
  int64_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (parsed.ec == std::errc()) return integer(value);
  return Value(Storage(BigInteger{std::make_shared<const std::string>(std::move(text))}));
}

Value Value::undefined(std::string message) {
  return Value(Storage(Undefined{std::make_shared<const std::string>(std::move(message))}));
}

Value Value::list(std::vector<Value> items) { return Value(Storage(make_list(std::move(items)))); }
Value Value::tuple(std::vector<Value> items) { return Value(Storage(Tuple{make_list(std::move(items))})); }

Value Value::dict(Dict dict) {
  checked_depth(dict.depth);
  return Value(Storage(DictPointer(std::make_shared<const Dict>(std::move(dict)))));
}

Value Value::method(Value self, std::string name) {
  const int depth = checked_depth(self.depth() + 1);
  return Value(Storage(std::make_shared<const Method>(Method{std::move(self), std::move(name), depth})));
}

const std::string* Value::text() const {
  const auto* string = as<String>();
  return string == nullptr ? nullptr : string->get();
}

const std::vector<Value>* Value::items() const {
  if (const auto* list = as<ListPointer>()) return &(*list)->items;
  if (const auto* tuple = as<Tuple>()) return &tuple->list->items;
  return nullptr;
}

const Dict* Value::dict() const {
  const auto* dict = as<DictPointer>();
  return dict == nullptr ? nullptr : dict->get();
}

bool Value::is_number() const {
  return as<bool>() != nullptr || as<int64_t>() != nullptr || as<double>() != nullptr || as<BigInteger>() != nullptr;
}

int Value::depth() const {
  if (const auto* list = as<ListPointer>()) return (*list)->depth;
  if (const auto* tuple = as<Tuple>()) return tuple->list->depth;
  if (const Dict* fields = dict()) return fields->depth;
  if (const auto* method = as<std::shared_ptr<const Method>>()) return (*method)->depth;
  if (const auto* loop = as<std::shared_ptr<LoopState>>()) return (*loop)->depth;
  return 0;
}

uint64_t Value::weight() const {
  constexpr uint64_t kScalar = 8;
  if (const std::string* string = text()) return string->size() + kScalar;
  if (const auto* list = as<ListPointer>()) return (*list)->weight;
  if (const auto* tuple = as<Tuple>()) return tuple->list->weight;
  if (const Dict* fields = dict()) return fields->weight;
  if (const auto* big = as<BigInteger>()) return big->text->size() + kScalar;
  return kScalar;
}

bool Value::truthy() const {
  if (is_undefined() || is_none()) return false;
  if (const bool* boolean = as<bool>()) return *boolean;
  if (const int64_t* integer = as<int64_t>()) return *integer != 0;
  if (const double* number = as<double>()) return *number != 0;
  if (const std::string* string = text()) return !string->empty();
  if (const auto* list = items()) return !list->empty();
  if (const Dict* fields = dict()) return !fields->entries.empty();
  return true;
}

std::string_view Value::type_name() const {
  constexpr std::string_view kNames[] = {"Undefined", "NoneType", "bool",        "int",    "int",
                                         "float",     "str",      "list",        "tuple",  "dict",
                                         "Namespace", "macro",    "LoopContext", "method", "function"};
  static_assert(std::size(kNames) == std::variant_size_v<Storage>);
  return kNames[storage_.index()];
}

const Value* Dict::find(std::string_view key) const {
  if (!index_.empty()) {
    const auto found = index_.find(std::string(key));
    return found == index_.end() ? nullptr : &entries[found->second].second;
  }
  for (const auto& [name, value] : entries) {
    if (name == key) return &value;
  }
  return nullptr;
}

void Dict::set(std::string key, Value value) {
  depth = std::max(depth, value.depth() + 1);
  weight += value.weight() + key.size();
  check_weight(weight);
  if (const Value* present = find(key)) {
    *const_cast<Value*>(present) = std::move(value);
    return;
  }
  if (!index_.empty()) index_.emplace(key, entries.size());
  entries.emplace_back(std::move(key), std::move(value));
  if (index_.empty() && entries.size() > kIndexedDictSize) {
    for (size_t i = 0; i < entries.size(); ++i) index_.emplace(entries[i].first, i);
  }
}

bool equal(const Value& left, const Value& right) {
  if (left.is_number() && right.is_number()) return compare_numbers(left, right) == 0;
  if (left.is_undefined() || left.is_none()) {
    return left.is_undefined() == right.is_undefined() && left.is_none() == right.is_none();
  }
  if (left.text() != nullptr && right.text() != nullptr) return *left.text() == *right.text();
  if (const auto* a = left.items(), *b = right.items(); a != nullptr && b != nullptr) {
    return (left.as<Tuple>() != nullptr) == (right.as<Tuple>() != nullptr) &&
           std::equal(a->begin(), a->end(), b->begin(), b->end(), equal);
  }
  if (const Dict* a = left.dict(), *b = right.dict(); a != nullptr && b != nullptr) {
    return a->entries.size() == b->entries.size() && std::ranges::all_of(a->entries, [&](const auto& entry) {
             const Value* other = b->find(entry.first);
             return other != nullptr && equal(entry.second, *other);
           });
  }
  if (auto* a = left.as<Namespace*>(), *b = right.as<Namespace*>(); a != nullptr && b != nullptr) return *a == *b;
  if (auto* a = left.as<const Macro*>(), *b = right.as<const Macro*>(); a != nullptr && b != nullptr) return *a == *b;
  return false;
}

int compare(const Value& left, const Value& right) {
  if (left.is_number() && right.is_number()) return compare_numbers(left, right);
  if (left.text() != nullptr && right.text() != nullptr) {
    // UTF-8 orders by code point, as Python does.
    const int order = left.text()->compare(*right.text());
    return sign(order<0, order> 0);
  }
  throw TemplateError("values of the types '" + std::string(left.type_name()) + "' and '" +
                      std::string(right.type_name()) + "' have no order");
}

std::string to_string(const Value& value) {
  if (const std::string* text = value.text()) return *text;
  return value.is_undefined() ? "" : to_repr(value);
}

std::string to_repr(const Value& value) {
  if (value.is_undefined()) return "Undefined";
  if (value.is_none()) return "None";
  if (const bool* boolean = value.as<bool>()) return *boolean ? "True" : "False";
  if (const int64_t* integer = value.as<int64_t>()) return std::to_string(*integer);
  if (const auto* big = value.as<BigInteger>()) return *big->text;
  if (const double* number = value.as<double>()) return float_text(*number);
  if (const std::string* text = value.text()) return quote(*text);
  if (const auto* tuple = value.as<Tuple>()) {
    return "(" + join_repr(tuple->list->items) + (tuple->list->items.size() == 1 ? ",)" : ")");
  }
  if (const auto* list = value.items()) return "[" + join_repr(*list) + "]";
  if (const Dict* dict = value.dict()) return dict_repr(*dict);
  return "<" + std::string(value.type_name()) + ">";
}

}  // namespace tokenspeed::text::jinja
