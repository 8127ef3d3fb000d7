#include "text/jinja_json.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "text/jinja_text.h"

namespace tokenspeed::text::jinja {
namespace {

class Reader : public nlohmann::json_sax<nlohmann::json> {
 public:
  bool null() override { return put(Value::none()); }
  bool boolean(bool value) override { return put(Value::boolean(value)); }
  bool number_integer(number_integer_t value) override { return put(Value::integer(value)); }
  bool number_unsigned(number_unsigned_t value) override { return put(Value::integer_text(std::to_string(value))); }
  // Integers past 64 bits arrive here too; only their text is exact.
  bool number_float(number_float_t value, const string_t& text) override {
    if (text.find_first_of(".eE") == std::string::npos) return put(Value::integer_text(text));
    return put(Value::number(value));
  }
  bool string(string_t& value) override { return put(Value::string(std::move(value))); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open(true); }
  bool key(string_t& value) override {
    frames_.back().key = std::move(value);
    return true;
  }
  bool end_object() override {
    Value value = Value::dict(std::move(frames_.back().dict));
    frames_.pop_back();
    return put(std::move(value));
  }
  bool start_array(size_t) override { return open(false); }
  bool end_array() override {
    Value value = Value::list(std::move(frames_.back().items));
    frames_.pop_back();
    return put(std::move(value));
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
    throw TemplateError("malformed JSON: " + std::string(error.what()));
  }

  Value result;

 private:
  struct Frame {
    bool is_object;
    std::string key;
    Dict dict;
    std::vector<Value> items;
  };

  bool open(bool is_object) {
    if (frames_.size() >= kMaximumDepth) {
      throw TemplateError("JSON nests deeper than " + std::to_string(kMaximumDepth) + " levels");
    }
    frames_.emplace_back().is_object = is_object;
    return true;
  }
  bool put(Value value) {
    if (frames_.empty()) {
      result = std::move(value);
    } else if (frames_.back().is_object) {
      frames_.back().dict.set(std::move(frames_.back().key), std::move(value));
    } else {
      frames_.back().items.push_back(std::move(value));
    }
    return true;
  }

  std::vector<Frame> frames_;
};

class Writer {
 public:
  Writer(int indent, bool sort_keys) : indent_(indent), sort_keys_(sort_keys) {}

  void write(const Value& value, int level) {
    if (value.is_none()) {
      out += "null";
    } else if (const bool* boolean = value.as<bool>()) {
      out += *boolean ? "true" : "false";
    } else if (const double* number = value.as<double>()) {
      out += float_json(*number);
    } else if (value.is_number()) {
      out += to_repr(value);
    } else if (const std::string* text = value.text()) {
      string(*text);
    } else if (const auto* items = value.items()) {
      list(*items, level);
    } else if (const Dict* dict = value.dict()) {
      object(*dict, level);
    } else {
      throw TemplateError("a value of the type '" + std::string(value.type_name()) + "' cannot be written as JSON");
    }
  }

  std::string out;

 private:
  static std::string float_json(double value) {
    if (std::isnan(value)) return "NaN";
    if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
    return float_text(value);
  }

  void string(std::string_view text) {
    out += '"';
    for (const char c : text) {
      constexpr std::string_view kSpecial = "\"\\\b\f\n\r\t", kLetters = "\"\\bfnrt";
      if (const size_t special = kSpecial.find(c); special != std::string_view::npos) {
        out += '\\';
        out += kLetters[special];
      } else if (static_cast<unsigned char>(c) < 0x20) {
        out += "\\u00";
        out += c < 0x10 ? '0' : '1';
        out += "0123456789abcdef"[c & 15];
      } else {
        out += c;
      }
    }
    out += '"';
  }

  void line(int level) {
    if (indent_ < 0) return;
    out += '\n';
    out.append(static_cast<size_t>(indent_) * static_cast<size_t>(level), ' ');
  }
  void comma() { out += indent_ < 0 ? ", " : ","; }

  void list(const std::vector<Value>& items, int level) {
    out += '[';
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) comma();
      line(level + 1);
      write(items[i], level + 1);
    }
    if (!items.empty()) line(level);
    out += ']';
  }

  void object(const Dict& dict, int level) {
    std::vector<const std::pair<std::string, Value>*> entries;
    for (const auto& entry : dict.entries) entries.push_back(&entry);
    if (sort_keys_) {
      std::ranges::sort(entries, [](const auto* a, const auto* b) { return a->first < b->first; });
    }
    out += '{';
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) comma();
      line(level + 1);
      string(entries[i]->first);
      out += ": ";
      write(entries[i]->second, level + 1);
    }
    if (!entries.empty()) line(level);
    out += '}';
  }

  int indent_;
  bool sort_keys_;
};

}  // namespace

Value read_json(std::string_view text) {
  Reader reader;
  nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
  return std::move(reader.result);
}

std::string write_json(const Value& value, int indent, bool sort_keys) {
  Writer writer(indent, sort_keys);
  writer.write(value, 0);
  return std::move(writer.out);
}

}  // namespace tokenspeed::text::jinja
