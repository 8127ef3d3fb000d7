#include "app/local_tools.h"

#include <fmt/format.h>
#include <unicode/timezone.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxFileBytes = 2000;  // the demo model was trained on short documents

Json error_answer(const std::string& message) { return {{"error", message}}; }

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

Json calculate(const Json& arguments) {
  const auto value = evaluate_expression(arguments.at("expression").get<std::string>());
  if (!value.ok()) return error_answer(value.status().message());
  return {{"result", Json::parse(fmt::format("{:.12g}", *value), nullptr, false)}};
}

struct Unit {
  const char* name;
  char quantity;  // Length, Mass, Speed, Time, Volume
  double size;    // in metres, kilograms, metres per second, seconds, litres
};
constexpr std::array kUnits = {Unit{"meters", 'l', 1},
                               Unit{"kilometers", 'l', 1000},
                               Unit{"centimeters", 'l', 0.01},
                               Unit{"millimeters", 'l', 0.001},
                               Unit{"miles", 'l', 1609.344},
                               Unit{"yards", 'l', 0.9144},
                               Unit{"feet", 'l', 0.3048},
                               Unit{"inches", 'l', 0.0254},
                               Unit{"kilograms", 'm', 1},
                               Unit{"grams", 'm', 0.001},
                               Unit{"pounds", 'm', 0.45359237},
                               Unit{"ounces", 'm', 0.028349523125},
                               Unit{"tons", 'm', 1000},
                               Unit{"km/h", 's', 1 / 3.6},
                               Unit{"mph", 's', 0.44704},
                               Unit{"knots", 's', 1852 / 3600.},
                               Unit{"m/s", 's', 1},
                               Unit{"seconds", 't', 1},
                               Unit{"minutes", 't', 60},
                               Unit{"hours", 't', 3600},
                               Unit{"days", 't', 86400},
                               Unit{"liters", 'v', 1},
                               Unit{"milliliters", 'v', 0.001},
                               Unit{"gallons", 'v', 3.785411784}};

const Unit* find_unit(const std::string& name) {
  const auto unit = std::find_if(kUnits.begin(), kUnits.end(), [wanted = lower(name)](const Unit& candidate) {
    return wanted == candidate.name || wanted + "s" == candidate.name;
  });
  return unit == kUnits.end() ? nullptr : &*unit;
}

Json convert_units(const Json& arguments) {
  const std::string from_name = arguments.at("from_unit");
  const std::string to_name = arguments.at("to_unit");
  const Unit* from = find_unit(from_name);
  const Unit* to = find_unit(to_name);
  if (from == nullptr || to == nullptr) return error_answer("unknown unit " + (from == nullptr ? from_name : to_name));
  if (from->quantity != to->quantity) return error_answer(from_name + " and " + to_name + " measure different things");
  const double result = arguments.at("value").get<double>() * from->size / to->size;
  return {{"result", Json::parse(fmt::format("{:.6g}", result), nullptr, false)}};
}

struct City {
  const char* name;
  const char* zone;
};
constexpr std::array kCities = {City{"amsterdam", "Europe/Amsterdam"},
                                City{"auckland", "Pacific/Auckland"},
                                City{"bangkok", "Asia/Bangkok"},
                                City{"beijing", "Asia/Shanghai"},
                                City{"berlin", "Europe/Berlin"},
                                City{"cairo", "Africa/Cairo"},
                                City{"chicago", "America/Chicago"},
                                City{"delhi", "Asia/Kolkata"},
                                City{"dublin", "Europe/Dublin"},
                                City{"havana", "America/Havana"},
                                City{"helsinki", "Europe/Helsinki"},
                                City{"istanbul", "Europe/Istanbul"},
                                City{"lagos", "Africa/Lagos"},
                                City{"lima", "America/Lima"},
                                City{"lisbon", "Europe/Lisbon"},
                                City{"london", "Europe/London"},
                                City{"madrid", "Europe/Madrid"},
                                City{"mexico city", "America/Mexico_City"},
                                City{"nairobi", "Africa/Nairobi"},
                                City{"new york", "America/New_York"},
                                City{"oslo", "Europe/Oslo"},
                                City{"paris", "Europe/Paris"},
                                City{"rome", "Europe/Rome"},
                                City{"san francisco", "America/Los_Angeles"},
                                City{"sao paulo", "America/Sao_Paulo"},
                                City{"seoul", "Asia/Seoul"},
                                City{"singapore", "Asia/Singapore"},
                                City{"stockholm", "Europe/Stockholm"},
                                City{"sydney", "Australia/Sydney"},
                                City{"tokyo", "Asia/Tokyo"},
                                City{"toronto", "America/Toronto"},
                                City{"vienna", "Europe/Vienna"},
                                City{"zurich", "Europe/Zurich"}};

// ICU carries its own time zones, so the answer does not depend on the machine's tzdata.
Json get_time(const Json& arguments) {
  const std::string name = arguments.at("city");
  const auto city =
      std::find_if(kCities.begin(), kCities.end(), [wanted = lower(name)](const City& c) { return wanted == c.name; });
  if (city == kCities.end()) return error_answer("unknown city " + name);
  const std::unique_ptr<icu::TimeZone> zone(icu::TimeZone::createTimeZone(icu::UnicodeString(city->zone)));
  const std::time_t now = std::time(nullptr);
  int32_t raw = 0;
  int32_t daylight = 0;
  UErrorCode code = U_ZERO_ERROR;
  zone->getOffset(static_cast<UDate>(now) * 1000, 0, raw, daylight, code);
  if (U_FAILURE(code)) return error_answer("the clock of " + name + " is not known");
  const int offset = (raw + daylight) / 60000;
  const std::time_t shifted = now + std::time_t{offset} * 60;
  std::tm local = {};
  gmtime_r(&shifted, &local);
  return {
      {"time", fmt::format("{:02}:{:02}", local.tm_hour, local.tm_min)},
      {"date", fmt::format("{:04}-{:02}-{:02}", local.tm_year + 1900, local.tm_mon + 1, local.tm_mday)},
      {"offset", fmt::format("{}{:02}:{:02}", offset < 0 ? '-' : '+', std::abs(offset) / 60, std::abs(offset) % 60)}};
}

// The file's text, or an error object. Nothing outside the working directory is read, links followed first.
std::string read_file(const Json& arguments) {
  const std::string path = arguments.at("path");
  std::error_code error;
  const auto root = std::filesystem::canonical(".", error);
  const auto file = std::filesystem::canonical(path, error);
  if (error || !std::filesystem::is_regular_file(file, error)) return error_answer("file not found: " + path).dump();
  if (std::mismatch(root.begin(), root.end(), file.begin(), file.end()).first != root.end()) {
    return error_answer("not allowed: " + path + " is outside the working directory").dump();
  }
  std::ifstream stream(file, std::ios::binary);
  std::string text(kMaxFileBytes, '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(stream.gcount()));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

class ExpressionParser {
 public:
  explicit ExpressionParser(const std::string& text) : text_(text) {}

  Result<double> parse() {
    const double value = sum();
    skip_spaces();
    if (position_ != text_.size() || failed_) {
      return invalid_argument("the expression cannot be read at position " + std::to_string(position_ + 1));
    }
    if (!std::isfinite(value)) return invalid_argument("the result is not a finite number");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 200;

  void skip_spaces() {
    while (position_ < text_.size() && text_[position_] == ' ') ++position_;
  }
  bool take(char wanted) {
    skip_spaces();
    if (position_ >= text_.size() || text_[position_] != wanted) return false;
    ++position_;
    return true;
  }
  double sum() {
    double value = product();
    while (true) {
      if (take('+')) {
        value += product();
      } else if (take('-')) {
        value -= product();
      } else {
        return value;
      }
    }
  }
  double product() {
    double value = power();
    while (true) {
      if (take('*')) {
        value *= power();
      } else if (take('/')) {
        value /= power();
      } else if (take('%')) {
        value = std::fmod(value, power());
      } else {
        return value;
      }
    }
  }
  double power() {
    if (++depth_ > kMaxDepth) failed_ = true;
    double value = failed_ ? 0 : operand();
    if (!failed_ && take('^')) value = std::pow(value, power());
    --depth_;
    return value;
  }
  double operand() {
    if (take('-')) return -power();
    if (take('(')) {
      const double value = sum();
      if (!take(')')) failed_ = true;
      return value;
    }
    skip_spaces();
    const size_t end = std::min(text_.find_first_not_of("0123456789.", position_), text_.size());
    const std::string digits = text_.substr(position_, end - position_);
    if (digits.empty() || std::count(digits.begin(), digits.end(), '.') > 1 || digits == ".") {
      failed_ = true;
      return 0;
    }
    position_ = end;
    return std::strtod(digits.c_str(), nullptr);
  }

  const std::string& text_;
  size_t position_ = 0;
  int depth_ = 0;
  bool failed_ = false;
};

Json schema(const char* name, const char* description, Json properties) {
  Json required = Json::array();
  for (const auto& [key, value] : properties.items()) required.push_back(key);
  return {{"type", "function"},
          {"function",
           {{"name", name},
            {"description", description},
            {"parameters", {{"type", "object"}, {"properties", std::move(properties)}, {"required", required}}}}}};
}

Json parameter(const char* type, const char* description) { return {{"type", type}, {"description", description}}; }

}  // namespace

Result<double> evaluate_expression(const std::string& expression) { return ExpressionParser(expression).parse(); }

const nlohmann::ordered_json& local_tool_schemas() {
  static const Json schemas = Json::array(
      {schema("calculate", "Compute the result of an expression.",
              {{"expression", parameter("string", "The math expression")}}),
       schema("convert_units", "Convert a value between units.",
              {{"value", parameter("number", "Value to convert")},
               {"from_unit", parameter("string", "Source unit")},
               {"to_unit", parameter("string", "Target unit")}}),
       schema("get_time", "Get the local time of a place.", {{"city", parameter("string", "City")}}),
       schema("read_file", "Returns the contents of a file.", {{"path", parameter("string", "Path of the file")}})});
  return schemas;
}

std::string call_local_tool(const std::string& name, const std::string& arguments_json) {
  const Json arguments = Json::parse(arguments_json, nullptr, false);
  if (!arguments.is_object()) return error_answer("the arguments are not a JSON object").dump();
  try {  // nlohmann reports a missing or mistyped argument by exception
    if (name == "calculate") return calculate(arguments).dump();
    if (name == "convert_units") return convert_units(arguments).dump();
    if (name == "get_time") return get_time(arguments).dump();
    if (name == "read_file") return read_file(arguments);
  } catch (const Json::exception& exception) {
    return error_answer(std::string("bad arguments: ") + exception.what()).dump();
  }
  return error_answer("there is no tool named " + name).dump();
}

}  // namespace tokenspeed::app
