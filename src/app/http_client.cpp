#include "app/http_client.h"

#include <array>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>

namespace tokenspeed::app {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using ErrorCode = beast::error_code;

// One request and its answer, read piece by piece.
class Exchange {
 public:
  Status open(const std::string& host, uint16_t port) {
    ErrorCode error;
    asio::ip::tcp::resolver resolver(context_);
    const auto endpoints = resolver.resolve(host, std::to_string(port), error);
    if (!error) asio::connect(stream_.socket(), endpoints, error);
    if (error) {
      return unavailable("no server answers at http://" + host + ":" + std::to_string(port) + " (" + error.message() +
                         ")");
    }
    return {};
  }

  Status send(http::verb verb, const std::string& host, const std::string& path, const std::string& body) {
    http::request<http::string_body> request{verb, path, 11};
    request.set(http::field::host, host);
    request.set(http::field::content_type, "application/json");
    request.body() = body;
    request.prepare_payload();
    ErrorCode error;
    http::write(stream_, request, error);
    if (!error) {
      parser_.body_limit(boost::none);
      http::read_header(stream_, buffer_, parser_, error);
    }
    return error ? unavailable("the server broke the connection: " + error.message()) : Status();
  }

  unsigned status() const { return parser_.get().result_int(); }

  // Appends what arrives next to *out. False when the body has ended.
  Result<bool> read_some(std::string* out) {
    if (parser_.is_done()) return false;
    std::array<char, 16384> piece;
    parser_.get().body().data = piece.data();
    parser_.get().body().size = piece.size();
    ErrorCode error;
    http::read_some(stream_, buffer_, parser_, error);
    if (error == http::error::need_buffer) error = {};
    if (error) return unavailable("the server broke off its answer: " + error.message());
    out->append(piece.data(), piece.size() - parser_.get().body().size);
    return true;
  }

  Result<std::string> read_all() {
    std::string body;
    while (true) {
      TS_ASSIGN_OR_RETURN(const bool more, read_some(&body));
      if (!more) return body;
    }
  }

 private:
  asio::io_context context_;
  beast::tcp_stream stream_{context_};
  beast::flat_buffer buffer_;
  http::response_parser<http::buffer_body> parser_;
};

Status error_of(unsigned status, const std::string& body) {
  const auto json = nlohmann::json::parse(body, nullptr, false);
  std::string message = body;
  if (json.is_object() && json.contains("error") && json["error"].is_object()) {
    message = json["error"].value("message", body);
  }
  return internal_error("HTTP " + std::to_string(status) + ": " + message);
}

// Hands the complete events of *text to on_event and removes them.
void take_events(std::string* text, const std::function<void(std::string_view)>& on_event) {
  size_t begin = 0;
  for (size_t end; (end = text->find("\n\n", begin)) != std::string::npos; begin = end + 2) {
    std::string_view event = std::string_view(*text).substr(begin, end - begin);
    constexpr std::string_view kData = "data: ";
    if (!event.starts_with(kData)) continue;
    event.remove_prefix(kData.size());
    if (event != "[DONE]") on_event(event);
  }
  text->erase(0, begin);
}

}  // namespace

Result<std::string> HttpClient::get(const std::string& path) const {
  Exchange exchange;
  TS_RETURN_IF_ERROR(exchange.open(host_, port_));
  TS_RETURN_IF_ERROR(exchange.send(http::verb::get, host_, path, ""));
  TS_ASSIGN_OR_RETURN(std::string body, exchange.read_all());
  if (exchange.status() != 200) return error_of(exchange.status(), body);
  return body;
}

Status HttpClient::post_events(const std::string& path, const std::string& body,
                               const std::function<void(std::string_view)>& on_event) const {
  Exchange exchange;
  TS_RETURN_IF_ERROR(exchange.open(host_, port_));
  TS_RETURN_IF_ERROR(exchange.send(http::verb::post, host_, path, body));
  if (exchange.status() != 200) {
    TS_ASSIGN_OR_RETURN(const std::string message, exchange.read_all());
    return error_of(exchange.status(), message);
  }
  std::string text;
  while (true) {
    TS_ASSIGN_OR_RETURN(const bool more, exchange.read_some(&text));
    take_events(&text, on_event);
    if (!more) return {};
  }
}

}  // namespace tokenspeed::app
