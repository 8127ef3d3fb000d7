// A small blocking HTTP/1.1 client for the program's own API: what demo and chat talk to the server with. One
// connection per request.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace tokenspeed::app {

class HttpClient {
 public:
  HttpClient(std::string host, uint16_t port) : host_(std::move(host)), port_(port) {}

  // The body of GET `path`. Errors: unavailable (no connection), internal_error with the server's message.
  Result<std::string> get(const std::string& path) const;
  // POSTs `body` and calls on_event with the data of each server-sent event as it arrives, "[DONE]" excluded.
  // Errors: as get.
  Status post_events(const std::string& path, const std::string& body,
                     const std::function<void(std::string_view)>& on_event) const;

 private:
  std::string host_;
  uint16_t port_;
};

}  // namespace tokenspeed::app
