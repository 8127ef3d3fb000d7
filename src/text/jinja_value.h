// Values of the chat-template language, with Python's types and spelling: a request's JSON and everything a template
// computes from it. Invariants: containers are immutable once shared and know how deeply they nest (kMaximumDepth) and
// what they weigh, so no value can be cyclic or overflow the stack when compared, printed or destroyed. Objects that
// templates may change (namespaces, macros' scopes) belong to the interpreter; a Value only points at them and must not
// outlive it. Cost: copying a Value is at most one reference count.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace tokenspeed::text::jinja {

inline constexpr int kMaximumDepth = 300;  // nesting of values and of template syntax
inline constexpr uint64_t kMaximumWeight = uint64_t{1} << 30;

// Thrown inside the template code only; ChatTemplate turns it into a Status. line 0: not known yet.
class TemplateError : public std::exception {
 public:
  explicit TemplateError(std::string message, int line = 0, bool raised = false)
      : message(std::move(message)), line(line), raised(raised) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
  int line;
  bool raised;  // by the template's own raise_exception()
};

class Value;
struct Dict;
struct Namespace;  // interpreter's
struct Macro;      // interpreter's
struct LoopState;  // interpreter's
struct Method;

struct List {
  std::vector<Value> items;
  int depth = 1;
  uint64_t weight = 1;
};
// A missing variable, key or index; `message` is what using it any further reports.
struct Undefined {
  std::shared_ptr<const std::string> message;
};
struct None {};
// An integer that does not fit 64 bits: kept as its decimal text, printed and compared, never computed with.
struct BigInteger {
  std::shared_ptr<const std::string> text;
};
using String = std::shared_ptr<const std::string>;
using ListPointer = std::shared_ptr<const List>;
using DictPointer = std::shared_ptr<const Dict>;
struct Tuple {
  ListPointer list;
};
enum class GlobalFunction { kRaiseException, kNamespace, kRange, kDict };

class Value {
 public:
  using Storage =
      std::variant<Undefined, None, bool, int64_t, BigInteger, double, String, ListPointer, Tuple, DictPointer,
                   Namespace*, const Macro*, std::shared_ptr<LoopState>, std::shared_ptr<const Method>, GlobalFunction>;

  Value() = default;  // undefined without a name
  explicit Value(Storage storage) : storage_(std::move(storage)) {}
  static Value none() { return Value(Storage(None{})); }
  static Value boolean(bool value) { return Value(Storage(value)); }
  static Value integer(int64_t value) { return Value(Storage(value)); }
  // `text`: decimal digits with an optional '-', in Python's spelling; becomes a plain integer when it fits.
  static Value integer_text(std::string text);
  static Value number(double value) { return Value(Storage(value)); }
  static Value string(std::string value) {
    return Value(Storage(String(std::make_shared<const std::string>(std::move(value)))));
  }
  static Value undefined(std::string message);
  // Throw TemplateError when the result would nest deeper than kMaximumDepth.
  static Value list(std::vector<Value> items);
  static Value tuple(std::vector<Value> items);
  static Value dict(Dict dict);
  static Value method(Value self, std::string name);

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&storage_);
  }
  bool is_undefined() const { return as<Undefined>() != nullptr; }
  bool is_none() const { return as<None>() != nullptr; }
  bool is_string() const { return as<String>() != nullptr; }
  // The text of a string value, else nullptr.
  const std::string* text() const;
  // The items of a list or tuple, else nullptr.
  const std::vector<Value>* items() const;
  const Dict* dict() const;
  bool is_number() const;  // bool, integer, big integer or float
  int depth() const;
  // An estimate of the bytes that printing or comparing it walks over; shared parts count each time they are met.
  uint64_t weight() const;
  bool truthy() const;
  // Python's type name, for messages ("str", "dict", "NoneType" ...).
  std::string_view type_name() const;

 private:
  Storage storage_;
};

// Keys in insertion order; setting a present key keeps its place, as in Python. A hash index serves large ones.
struct Dict {
  std::vector<std::pair<std::string, Value>> entries;
  int depth = 1;
  uint64_t weight = 1;

  const Value* find(std::string_view key) const;
  void set(std::string key, Value value);

 private:
  std::unordered_map<std::string, size_t> index_;  // empty while the dict is small
};

// A method taken from a string, list, tuple or dict but not called yet.
struct Method {
  Value self;
  std::string name;
  int depth;
};

bool equal(const Value& left, const Value& right);
// Python's order of numbers and of strings (-1, 0, 1; 2 for a NaN); throws for other pairs.
int compare(const Value& left, const Value& right);
// Python's str() and repr().
std::string to_string(const Value& value);
std::string to_repr(const Value& value);

}  // namespace tokenspeed::text::jinja
