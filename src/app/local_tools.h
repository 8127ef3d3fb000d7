// The tools of demo and chat: real, local and harmless, of the families that the demo model knows. They answer from
// this machine only: arithmetic, unit conversion, the clock, and files under the working directory.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "base/status.h"

namespace tokenspeed::app {

// The "tools" array of a chat request.
const nlohmann::ordered_json& local_tool_schemas();

// The tool's answer as the text of a tool message. What goes wrong (unknown tool, bad arguments) is an answer too, a
// JSON object with "error": the model is to read it.
std::string call_local_tool(const std::string& name, const std::string& arguments_json);

// The value of an expression of numbers, + - * / % ^, parentheses and unary minus.
// Errors: invalid_argument naming the place.
Result<double> evaluate_expression(const std::string& expression);

}  // namespace tokenspeed::app
