#include "text/chat_template.h"

#include <utility>

#include "text/jinja_interpreter.h"
#include "text/jinja_json.h"
#include "text/jinja_parser.h"

namespace tokenspeed::text {
namespace {

constexpr const char* kTemplateFile = "chat_template.jinja";
constexpr const char* kConfigFile = "tokenizer_config.json";

Status template_status(const jinja::TemplateError& error) {
  const std::string line = "line " + std::to_string(error.line) + " of the chat template";
  if (error.raised) return invalid_argument(error.message + " (raised by " + line + ")");
  return invalid_argument(line + ": " + error.message);
}

// "chat_template" of a tokenizer_config.json; undefined when absent.
jinja::Value configured_template(const jinja::Value& config) {
  const jinja::Value* entry = config.dict() == nullptr ? nullptr : config.dict()->find("chat_template");
  if (entry == nullptr) return {};
  if (entry->items() == nullptr) return *entry;
  for (const jinja::Value& named : *entry->items()) {
    if (named.dict() == nullptr) continue;
    const jinja::Value* name = named.dict()->find("name");
    const jinja::Value* text = named.dict()->find("template");
    if (name != nullptr && text != nullptr && name->text() != nullptr && *name->text() == "default") return *text;
  }
  return {};
}

Result<std::string> template_source(const Directory& directory, std::string& path) {
  path = directory.path_of(kTemplateFile);
  auto file = directory.read(kTemplateFile);
  if (file.ok() || file.status().code() != StatusCode::kNotFound) return file;
  path = directory.path_of(kConfigFile);
  TS_ASSIGN_OR_RETURN(const std::string config, directory.read(kConfigFile));
  try {
    const jinja::Value source = configured_template(jinja::read_json(config));
    if (source.text() != nullptr) return *source.text();
  } catch (const jinja::TemplateError& error) {
    return invalid_argument(path + ": " + error.message);
  }
  return not_found(path + " has no \"chat_template\" and there is no chat_template.jinja beside it; add one of them");
}

}  // namespace

struct ChatTemplate::Parsed {
  jinja::Block block;
};

ChatTemplate::ChatTemplate(std::unique_ptr<const Parsed> parsed) : parsed_(std::move(parsed)) {}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

Result<ChatTemplate> ChatTemplate::parse(std::string_view source) {
  try {
    auto parsed = std::make_unique<Parsed>();
    parsed->block = jinja::parse_template(source);
    return ChatTemplate(std::move(parsed));
  } catch (const jinja::TemplateError& error) {
    return template_status(error);
  }
}

Result<std::string> ChatTemplate::render(std::string_view request_json) const {
  jinja::Value request;
  try {
    request = jinja::read_json(request_json);
  } catch (const jinja::TemplateError& error) {
    return invalid_argument("the chat request is no valid JSON: " + error.message);
  }
  if (request.dict() == nullptr) return invalid_argument("the chat request must be a JSON object");
  try {
    return jinja::Interpreter(*request.dict(), jinja::Limits{}).run(parsed_->block);
  } catch (const jinja::TemplateError& error) {
    return template_status(error);
  }
}

Result<ChatTemplate> load_chat_template(const Directory& model_directory) {
  std::string path;
  TS_ASSIGN_OR_RETURN(const std::string source, template_source(model_directory, path));
  auto parsed = ChatTemplate::parse(source);
  if (!parsed.ok()) return Status(parsed.status()).with_context(path);
  return parsed;
}

}  // namespace tokenspeed::text
