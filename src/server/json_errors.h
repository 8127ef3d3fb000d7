// Errors as OpenAI's error object with the HTTP status that fits.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "server/exchange.h"

namespace tokenspeed::server {

// The error object as one JSON text. `param` may be empty (null); `code` too.
std::string error_json(std::string_view message, std::string_view type, std::string_view param, std::string_view code);
int http_status(StatusCode code);
void reply_error(Exchange& exchange, const Status& status);
// The error object for a status inside a stream that has begun.
std::string error_event(const Status& status);
void reply_http_error(Exchange& exchange, int http_status, std::string_view message, std::string_view code);

}  // namespace tokenspeed::server
