#include <ctime>
#include <string_view>

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

namespace {

// {model} and {length} are filled in. The script only puts the address in use into the example.
constexpr std::string_view kIndexPage = R"(<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TokenSpeed: {model}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 3rem auto; padding: 0 1rem; color: #222 }
  pre { background: #f3f3f3; padding: .8rem; overflow-x: auto }
  td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
  code, pre { font: 14px/1.5 ui-monospace, monospace }
</style>
<h1>TokenSpeed</h1>
<p>Serving <b>{model}</b> with up to {length} tokens of prompt and answer.</p>
<pre>curl <span id="origin">http://127.0.0.1:8000</span>/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "{model}",
  "messages": [{"role": "user", "content": "Hello"}]
}'</pre>
<table>
  <tr><td><code>POST /v1/chat/completions</code><td>chat with tools, streamed or whole, as OpenAI's
  <tr><td><code>POST /v1/completions</code><td>text or token-id prompts
  <tr><td><code>GET <a href="/v1/models">/v1/models</a></code><td>the model and its limits
  <tr><td><code>POST /tokenize</code>, <code>/detokenize</code><td>text to token ids and back
  <tr><td><code>GET <a href="/health">/health</a></code><td>200 while tokens advance whenever work is pending
  <tr><td><code>GET <a href="/metrics">/metrics</a></code><td>Prometheus metrics
  <tr><td><code>GET <a href="/version">/version</a></code><td>of this server
</table>
<script>document.getElementById("origin").textContent = location.origin</script>
</html>
)";

std::string html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '&':
        out += "&amp;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

}  // namespace

std::string index_page(const ServerContext& context) {
  std::string page(kIndexPage);
  const auto fill = [&](std::string_view blank, const std::string& text) {
    for (size_t at = page.find(blank); at != std::string::npos; at = page.find(blank, at + text.size())) {
      page.replace(at, blank.size(), text);
    }
  };
  fill("{length}", std::to_string(context.model.max_model_length));
  fill("{model}", html(context.model.name));
  return page;
}

}  // namespace tokenspeed::server
