#include "server/router.h"

#include "server/json_errors.h"

namespace tokenspeed::server {
namespace {

constexpr const char* kJson = "application/json";
constexpr double kStalledSeconds = 30;

bool authorized(const ServerContext& context, const HttpRequest& request, std::string_view path) {
  if (context.options.api_key.empty() || !path.starts_with("/v1")) return true;
  const std::string expected = "Bearer " + context.options.api_key;
  // Every byte is compared, so that the time says nothing about the key.
  unsigned different = expected.size() != request.authorization.size();
  for (size_t i = 0; i < expected.size() && i < request.authorization.size(); ++i) {
    different |= static_cast<unsigned>(expected[i] ^ request.authorization[i]);
  }
  return different == 0;
}

void health(ServerContext& context, const HttpRequest&, Exchange& exchange) {
  const double stalled = context.engine.statistics().seconds_since_progress;
  if (stalled < kStalledSeconds) return exchange.reply(200, kJson, "{\"status\":\"ok\"}");
  reply_http_error(
      exchange, 503,
      "Requests are pending but no token has advanced for " + std::to_string(static_cast<int64_t>(stalled)) + " s.",
      "");
}

struct Route {
  std::string_view method;
  std::string_view path;
  void (*handle)(ServerContext&, const HttpRequest&, Exchange&);
};

constexpr Route kRoutes[] = {
    {"POST", "/v1/chat/completions", handle_chat_completions},
    {"POST", "/v1/completions", handle_completions},
    {"POST", "/tokenize", handle_tokenize},
    {"POST", "/detokenize", handle_detokenize},
    {"GET", "/health", health},
    {"GET", "/v1/models",
     [](ServerContext& c, const HttpRequest&, Exchange& e) { e.reply(200, kJson, models_json(c)); }},
    {"GET", "/version",
     [](ServerContext&, const HttpRequest&, Exchange& e) {
       e.reply(200, kJson, "{\"version\":\"" TOKENSPEED_VERSION "\"}");
     }},
    {"GET", "/metrics",
     [](ServerContext& c, const HttpRequest&, Exchange& e) {
       e.reply(200, "text/plain; version=0.0.4", c.metrics.render(c.engine.statistics()));
     }},
    {"GET", "/",
     [](ServerContext& c, const HttpRequest&, Exchange& e) {
       e.reply(200, "text/html; charset=utf-8", index_page(c));
     }},
};

}  // namespace

void route(ServerContext& context, HttpRequest&& request, Exchange& exchange) {
  const std::string path = request.target.substr(0, request.target.find('?'));
  if (!authorized(context, request, path)) {
    return reply_http_error(exchange, 401, "The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                            "invalid_api_key");
  }
  const std::string_view method = request.method == "HEAD" ? "GET" : std::string_view(request.method);
  for (const Route& entry : kRoutes) {
    if (entry.path != path) continue;
    if (entry.method == method) return entry.handle(context, request, exchange);
    const std::string message =
        request.method + " is not a method of " + path + "; use " + std::string(entry.method) + ".";
    return exchange.reply(405, kJson, error_json(message, "invalid_request_error", "", ""),
                          "Allow: " + std::string(entry.method) + "\r\n");
  }
  constexpr std::string_view kModels = "/v1/models/";
  if (path.starts_with(kModels) && method == "GET") {
    const std::string name = path.substr(kModels.size());
    if (name == context.model.name) return exchange.reply(200, kJson, model_json(context));
    return reply_error(
        exchange, not_found("The model '" + name + "' does not exist; this server has '" + context.model.name + "'.")
                      .with_param("model"));
  }
  reply_http_error(exchange, 404, "There is nothing at " + request.method + " " + path + "; GET / lists the endpoints.",
                   "");
}

}  // namespace tokenspeed::server
