// One HTTP request and the way to answer it. Everything here happens on the connection's strand, but for the poster.
// Invariant: exactly one answer per request: reply(), or begin_stream() .. end_stream().
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace tokenspeed::server {

struct HttpRequest {
  std::string method;
  std::string target;
  std::string authorization;
  std::string body;
};

class Exchange {
 public:
  // Runs a function on the strand, from any thread; drops it when the connection is gone. May outlive the server.
  using Poster = std::function<void(std::function<void()>)>;

  virtual ~Exchange() = default;
  // extra_headers: whole lines, each ended by CRLF.
  virtual void reply(int status, std::string_view content_type, std::string_view body,
                     std::string_view extra_headers = {}) = 0;
  virtual void begin_stream() = 0;
  virtual void write(std::string_view data) = 0;
  virtual void end_stream() = 0;
  virtual Poster poster() = 0;
  // Keeps `work` until the answer is complete or the client is gone; releasing it is how work is cancelled.
  virtual void hold(std::shared_ptr<void> work) = 0;
};

}  // namespace tokenspeed::server
