// tokenize and render: text in, ids or prompts out, with nothing but a model directory's tokenizer and template files.
#include <fmt/core.h>

#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/embedded_model.h"
#include "server/render.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;

struct TokenizeFlags {
  std::string directory;
  bool lines = false;
  bool decode = false;
};

std::string read_stdin() { return {std::istreambuf_iterator<char>(std::cin), {}}; }

Result<std::string> encode_to_json(const text::Tokenizer& tokenizer, std::string_view text) {
  TS_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer.encode(text));
  return Json(ids).dump();
}

Result<std::string> decode_ids(const text::Tokenizer& tokenizer, const std::string& line) {
  const Json ids = Json::parse(line, nullptr, false);
  if (!ids.is_array() || !std::all_of(ids.begin(), ids.end(), [](const Json& id) { return id.is_number_integer(); })) {
    return invalid_argument("not a JSON array of token ids: " + line.substr(0, 80));
  }
  return tokenizer.decode(ids.get<std::vector<int32_t>>(), false);
}

// One line of --jsonl.
Result<std::string> convert_line(const text::Tokenizer& tokenizer, bool decode, const std::string& line) {
  if (decode) {
    TS_ASSIGN_OR_RETURN(const std::string text, decode_ids(tokenizer, line));
    return Json(text).dump();
  }
  const Json text = Json::parse(line, nullptr, false);
  if (!text.is_string()) return invalid_argument("not a JSON string: " + line.substr(0, 80));
  return encode_to_json(tokenizer, text.get_ref<const std::string&>());
}

// Calls convert for every line of stdin and prints what it returns; an error names the line and ends.
template <typename Convert>
Status convert_lines(const Convert& convert) {
  int64_t number = 0;
  for (std::string line; std::getline(std::cin, line);) {
    ++number;
    auto converted = convert(line);
    if (!converted.ok()) return Status(converted.status()).with_context("line " + std::to_string(number));
    fmt::print("{}\n", *converted);
  }
  return {};
}

Status tokenize(const TokenizeFlags& flags) {
  TS_ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::load(model_directory(flags.directory)));
  if (flags.lines) {
    return convert_lines([&](const std::string& line) { return convert_line(tokenizer, flags.decode, line); });
  }
  const std::string input = read_stdin();
  if (flags.decode) {
    TS_ASSIGN_OR_RETURN(const std::string text, decode_ids(tokenizer, input));
    fmt::print("{}", text);
  } else {
    TS_ASSIGN_OR_RETURN(const std::string ids, encode_to_json(tokenizer, input));
    fmt::print("{}\n", ids);
  }
  return {};
}

}  // namespace

void add_tokenize_command(CLI::App& program, int* exit_code) {
  const auto flags = std::make_shared<TokenizeFlags>();
  CLI::App* command = program.add_subcommand("tokenize", "Text on stdin to a JSON array of token ids");
  command->add_option("model", flags->directory, "Directory that holds tokenizer.json, or demo")->required();
  command->add_flag("--jsonl", flags->lines, "A JSON string a line to an array a line");
  command->add_flag("--decode", flags->decode, "The reverse: ids to text");
  set_action(command, exit_code, [flags] { return tokenize(*flags); });
}

void add_render_command(CLI::App& program, int* exit_code) {
  const auto directory = std::make_shared<std::string>();
  CLI::App* command = program.add_subcommand(
      "render", "Chat requests on stdin, a JSON object a line, to prompts, a JSON string a line");
  command->add_option("model", *directory, "Directory that holds the chat template, or demo")->required();
  set_action(command, exit_code, [directory]() -> Status {
    TS_ASSIGN_OR_RETURN(const auto chat_template, text::load_chat_template(model_directory(*directory)));
    return convert_lines([&](const std::string& line) -> Result<std::string> {
      TS_ASSIGN_OR_RETURN(const std::string prompt, server::render_chat_request(chat_template, line));
      return Json(prompt).dump();
    });
  });
}

}  // namespace tokenspeed::app
