#include "server/json_errors.h"

#include "server/json_text.h"

namespace tokenspeed::server {
namespace {

std::string_view error_type(int status) {
  if (status == 401) return "authentication_error";
  if (status == 429) return "rate_limit_error";
  return status >= 500 ? "server_error" : "invalid_request_error";
}

std::string status_json(const Status& status) {
  const bool no_model = status.code() == StatusCode::kNotFound && status.param() == "model";
  return error_json(status.message(), error_type(http_status(status.code())), status.param(),
                    no_model ? "model_not_found" : "");
}

}  // namespace

std::string error_json(std::string_view message, std::string_view type, std::string_view param, std::string_view code) {
  const auto or_null = [](std::string_view text) { return text.empty() ? std::string("null") : json_quoted(text); };
  return "{\"error\":{\"message\":" + json_quoted(message) + ",\"type\":" + json_quoted(type) +
         ",\"param\":" + or_null(param) + ",\"code\":" + or_null(code) + "}}";
}

int http_status(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return 200;
    case StatusCode::kInvalidArgument:
    case StatusCode::kFailedPrecondition:
    case StatusCode::kUnimplemented:
      return 400;
    case StatusCode::kNotFound:
      return 404;
    case StatusCode::kResourceExhausted:
      return 429;
    case StatusCode::kCancelled:
    case StatusCode::kUnavailable:
      return 503;
    case StatusCode::kDataLoss:
    case StatusCode::kInternal:
      return 500;
  }
  return 500;
}

void reply_error(Exchange& exchange, const Status& status) {
  const int code = http_status(status.code());
  exchange.reply(code, "application/json", status_json(status), code == 429 ? "Retry-After: 1\r\n" : "");
}

std::string error_event(const Status& status) { return "data: " + status_json(status) + "\n\n"; }

void reply_http_error(Exchange& exchange, int status, std::string_view message, std::string_view code) {
  exchange.reply(status, "application/json", error_json(message, error_type(status), "", code));
}

}  // namespace tokenspeed::server
