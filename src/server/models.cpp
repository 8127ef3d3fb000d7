#include <ctime>

#include "server/json_text.h"
#include "server/router.h"

namespace tokenspeed::server {

std::string model_json(const ServerContext& context) {
  static const std::time_t started = std::time(nullptr);
  return "{\"id\":" + json_quoted(context.model.name) + ",\"object\":\"model\",\"created\":" + std::to_string(started) +
         ",\"owned_by\":\"tokenspeed\",\"root\":" + json_quoted(context.model.directory) +
         ",\"parent\":null,\"max_model_len\":" + std::to_string(context.model.max_model_length) + "}";
}

std::string models_json(const ServerContext& context) {
  return "{\"object\":\"list\",\"data\":[" + model_json(context) + "]}";
}

std::string index_page(const ServerContext& context) {
  std::string name;
  for (const char c : context.model.name) {
    if (c == '<')
      name += "&lt;";
    else if (c == '&')
      name += "&amp;";
    else
      name += c;
  }
  return "<!doctype html><html lang=en><meta charset=utf-8><title>TokenSpeed</title><body><h1>TokenSpeed</h1>"
         "<p>Serving <b>" +
         name + "</b>, up to " + std::to_string(context.model.max_model_length) +
         " tokens.</p><ul><li>POST /v1/chat/completions<li>POST /v1/completions<li>GET <a "
         "href=/v1/models>/v1/models</a>"
         "<li>POST /tokenize<li>POST /detokenize<li>GET <a href=/health>/health</a>"
         "<li>GET <a href=/version>/version</a><li>GET <a href=/metrics>/metrics</a></ul></body></html>\n";
}

}  // namespace tokenspeed::server
