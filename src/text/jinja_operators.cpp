#include <algorithm>
#include <cmath>

#include "text/jinja_builtins.h"
#include "text/jinja_objects.h"
#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {
namespace {

std::optional<int64_t> as_integer(const Value& value) {
  if (const bool* boolean = value.as<bool>()) return *boolean;
  if (const int64_t* integer = value.as<int64_t>()) return *integer;
  return std::nullopt;
}

[[noreturn]] void fail_operands(std::string_view op, const Value& left, const Value& right) {
  require_defined(left);
  require_defined(right);
  throw TemplateError("unsupported operand types for " + std::string(op) + ": '" + std::string(left.type_name()) +
                      "' and '" + std::string(right.type_name()) + "'");
}

int64_t integer_power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  bool overflow = false;
  while (exponent > 0) {
    if (exponent & 1) overflow |= __builtin_mul_overflow(result, base, &result);
    exponent >>= 1;
    if (exponent > 0) overflow |= __builtin_mul_overflow(base, base, &base);
    if (overflow) throw TemplateError("an integer result does not fit 64 bits");
  }
  return result;
}

Value integer_arithmetic(std::string_view op, int64_t a, int64_t b) {
  int64_t result = 0;
  bool overflow = false;
  if (op == "/") {
    if (b == 0) throw TemplateError("division by zero");
    return Value::number(static_cast<double>(a) / static_cast<double>(b));
  }
  if (op == "**") {
    if (b < 0) return Value::number(std::pow(static_cast<double>(a), static_cast<double>(b)));
    return Value::integer(integer_power(a, b));
  }
  if (op == "//" || op == "%") {
    if (b == 0) throw TemplateError("division by zero");
    if (b == -1) {
      if (op == "%") return Value::integer(0);
      overflow = __builtin_sub_overflow(int64_t{0}, a, &result);
    } else {
      const int64_t remainder = a % b;
      const bool adjust = remainder != 0 && (remainder < 0) != (b < 0);  // Python rounds towards minus infinity
      result = op == "//" ? a / b - adjust : remainder + (adjust ? b : 0);
    }
  } else if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &result);
  } else {
    overflow = __builtin_mul_overflow(a, b, &result);
  }
  if (overflow) throw TemplateError("an integer result does not fit 64 bits");
  return Value::integer(result);
}

double as_double(const Value& value) {
  if (const double* number = value.as<double>()) return *number;
  if (const auto integer = as_integer(value)) return static_cast<double>(*integer);
  throw TemplateError("an integer beyond 64 bits cannot be computed with");
}

Value float_arithmetic(std::string_view op, double a, double b) {
  if (op == "+") return Value::number(a + b);
  if (op == "-") return Value::number(a - b);
  if (op == "*") return Value::number(a * b);
  if (op == "**") return Value::number(std::pow(a, b));
  if (b == 0) throw TemplateError("division by zero");
  if (op == "/") return Value::number(a / b);
  double remainder = std::fmod(a, b);
  if (remainder != 0 && (remainder < 0) != (b < 0)) remainder += b;
  if (op == "%") return Value::number(remainder == 0 ? std::copysign(0.0, b) : remainder);
  const double quotient = (a - remainder) / b;
  const double floor = std::floor(quotient);
  return Value::number(quotient - floor > 0.5 ? floor + 1 : floor);
}

Value repeat(const Value& value, int64_t count, Budget& budget) {
  const uint64_t times = static_cast<uint64_t>(std::max<int64_t>(count, 0));
  const uint64_t weight = value.weight();
  if (times > kMaximumWeight / weight) throw TemplateError("a repeated value is too large");
  budget.bytes(times * weight * (value.text() != nullptr ? 1 : 4));
  if (const std::string* text = value.text()) {
    std::string out;
    for (uint64_t i = 0; i < times; ++i) out += *text;
    return Value::string(std::move(out));
  }
  std::vector<Value> out;
  for (uint64_t i = 0; i < times; ++i) out.insert(out.end(), value.items()->begin(), value.items()->end());
  return value.as<Tuple>() != nullptr ? Value::tuple(std::move(out)) : Value::list(std::move(out));
}

// Clamps a slice bound as Python's slice.indices().
int64_t slice_bound(const Value& value, int64_t size, bool backwards, int64_t absent) {
  if (value.is_undefined() || value.is_none()) return absent;
  const auto given = as_integer(value);
  if (!given) throw TemplateError("slice indices must be integers");
  const int64_t least = backwards ? -1 : 0, most = backwards ? size - 1 : size;
  if (*given < 0) return *given < -size ? least : *given + size;
  return std::min(*given, most);
}

}  // namespace

void require_defined(const Value& value) {
  const auto* undefined = value.as<Undefined>();
  if (undefined == nullptr) return;
  throw TemplateError(undefined->message == nullptr ? "a value is undefined" : *undefined->message);
}

ListPointer iterate(const Value& value, Budget& budget) {
  if (const auto* list = value.as<ListPointer>()) return *list;
  if (const auto* tuple = value.as<Tuple>()) return tuple->list;
  std::vector<Value> items;
  if (const Dict* dict = value.dict()) {
    budget.bytes(dict->entries.size() * 64);
    for (const auto& entry : dict->entries) items.push_back(Value::string(entry.first));
  } else if (const std::string* text = value.text()) {
    budget.bytes(text->size() * 64);
    for (const std::string_view character : characters(*text)) items.push_back(Value::string(std::string(character)));
  } else if (!value.is_undefined()) {
    throw TemplateError("a value of the type '" + std::string(value.type_name()) + "' cannot be looped over");
  }
  return *Value::list(std::move(items)).as<ListPointer>();
}

bool contains(const Value& container, const Value& item, Budget& budget) {
  budget.bytes(container.weight());
  if (const std::string* text = container.text()) {
    if (item.text() == nullptr) {
      throw TemplateError("'in <string>' needs a string on its left, not '" + std::string(item.type_name()) + "'");
    }
    return text->find(*item.text()) != std::string::npos;
  }
  if (const Dict* dict = container.dict()) return item.text() != nullptr && dict->find(*item.text()) != nullptr;
  if (const auto* items = container.items()) {
    return std::ranges::any_of(*items, [&](const Value& candidate) { return equal(candidate, item); });
  }
  if (container.is_undefined()) return false;
  throw TemplateError("a value of the type '" + std::string(container.type_name()) + "' has no elements");
}

Value arithmetic(std::string_view op, const Value& left, const Value& right, Budget& budget) {
  if (left.is_number() && right.is_number()) {
    const auto a = as_integer(left), b = as_integer(right);
    if (a && b) return integer_arithmetic(op, *a, *b);
    return float_arithmetic(op, as_double(left), as_double(right));
  }
  if (op == "+") {
    budget.bytes(left.weight() + right.weight());
    if (left.text() != nullptr && right.text() != nullptr) return Value::string(*left.text() + *right.text());
    const auto *a = left.items(), *b = right.items();
    const bool is_tuple = left.as<Tuple>() != nullptr;
    if (a != nullptr && b != nullptr && is_tuple == (right.as<Tuple>() != nullptr)) {
      std::vector<Value> items = *a;
      items.insert(items.end(), b->begin(), b->end());
      return is_tuple ? Value::tuple(std::move(items)) : Value::list(std::move(items));
    }
  }
  if (op == "*") {
    const auto a = as_integer(left), b = as_integer(right);
    if (b && (left.text() != nullptr || left.items() != nullptr)) return repeat(left, *b, budget);
    if (a && (right.text() != nullptr || right.items() != nullptr)) return repeat(right, *a, budget);
  }
  fail_operands(op, left, right);
}

Value negative(const Value& value) {
  if (const double* number = value.as<double>()) return Value::number(-*number);
  if (const auto integer = as_integer(value)) return integer_arithmetic("-", 0, *integer);
  if (const auto* big = value.as<BigInteger>()) {
    return Value::integer_text((*big->text)[0] == '-' ? big->text->substr(1) : "-" + *big->text);
  }
  require_defined(value);
  throw TemplateError("a value of the type '" + std::string(value.type_name()) + "' has no negative");
}

Value get_item(const Value& value, const Value& key) {
  require_defined(value);
  if (const Dict* dict = value.dict()) {
    const Value* found = key.text() == nullptr ? nullptr : dict->find(*key.text());
    if (found != nullptr) return *found;
  }
  if (auto* const* space = value.as<Namespace*>(); space != nullptr && key.text() != nullptr) {
    if (const Value* found = (*space)->fields.find(*key.text())) return *found;
  }
  if (const auto index = as_integer(key)) {
    if (const auto* items = value.items()) {
      const int64_t size = static_cast<int64_t>(items->size());
      if (*index >= -size && *index < size) return (*items)[static_cast<size_t>(*index < 0 ? *index + size : *index)];
    } else if (const std::string* text = value.text()) {
      const auto all = characters(*text);
      const int64_t size = static_cast<int64_t>(all.size());
      if (*index >= -size && *index < size) {
        return Value::string(std::string(all[static_cast<size_t>(*index < 0 ? *index + size : *index)]));
      }
    }
  }
  const std::string name = key.text() != nullptr ? "attribute " + quote(*key.text()) : "element " + to_repr(key);
  return Value::undefined("'" + std::string(value.type_name()) + " object' has no " + name);
}

Value get_slice(const Value& value, const Value& start, const Value& stop, const Value& step, Budget& budget) {
  require_defined(value);
  const auto by = step.is_undefined() || step.is_none() ? std::optional<int64_t>(1) : as_integer(step);
  if (!by || *by == 0) throw TemplateError("a slice's step must be an integer other than 0");
  if (value.text() == nullptr && value.items() == nullptr) {
    return Value::undefined("'" + std::string(value.type_name()) + " object' has no slices");
  }
  const ListPointer list = iterate(value, budget);
  const int64_t size = static_cast<int64_t>(list->items.size());
  budget.bytes(static_cast<uint64_t>(size) * 32);
  const bool backwards = *by < 0;
  int64_t i = slice_bound(start, size, backwards, backwards ? size - 1 : 0);
  const int64_t end = slice_bound(stop, size, backwards, backwards ? -1 : size);
  std::vector<Value> items;
  while (backwards ? i > end : i < end) {
    items.push_back(list->items[static_cast<size_t>(i)]);
    if (__builtin_add_overflow(i, *by, &i)) break;
  }
  if (value.items() != nullptr) {
    return value.as<Tuple>() != nullptr ? Value::tuple(std::move(items)) : Value::list(std::move(items));
  }
  std::string text;
  for (const Value& item : items) text += *item.text();
  return Value::string(std::move(text));
}

}  // namespace tokenspeed::text::jinja
