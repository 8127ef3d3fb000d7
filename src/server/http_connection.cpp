#include "server/http_connection.h"

#include <boost/asio/bind_executor.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/status.hpp>
#include <charconv>

#include "base/log.h"
#include "server/json_errors.h"

namespace tokenspeed::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";
constexpr size_t kMaxReadAhead = 64 << 10;
constexpr uint32_t kMaxHeaderBytes = 32 << 10;

}  // namespace

HttpConnection::HttpConnection(std::shared_ptr<asio::io_context> context, Socket socket, ConnectionLimits limits,
                               Handler handler)
    : context_(std::move(context)),
      stream_(std::move(socket)),
      limits_(limits),
      handler_(std::move(handler)),
      buffer_(kMaxHeaderBytes + kMaxReadAhead) {
  boost::beast::error_code ignored;
  stream_.socket().set_option(Tcp::no_delay(true), ignored);
}

void HttpConnection::start() {
  asio::dispatch(stream_.get_executor(), [self = shared_from_this()] { self->read_request(); });
}

void HttpConnection::close() {
  asio::post(stream_.get_executor(), [self = shared_from_this()] { self->shut(); });
}

void HttpConnection::read_request() {
  if (closed_) return;
  parser_.emplace();
  parser_->header_limit(kMaxHeaderBytes);
  parser_->body_limit(limits_.max_body_bytes);
  stream_.expires_after(limits_.timeout);
  http::async_read_header(stream_, buffer_, *parser_,
                          [self = shared_from_this()](boost::beast::error_code error, size_t) {
                            if (error || self->closed_) return self->on_request(error);
                            self->read_body();
                          });
}

void HttpConnection::read_body() {
  const auto& message = parser_->get();
  if (boost::beast::iequals(message[http::field::expect], "100-continue") && !parser_->is_done()) {
    asio::async_write(stream_, asio::buffer(kContinue),
                      [self = shared_from_this()](boost::beast::error_code, size_t) { self->read_rest(); });
  } else {
    read_rest();
  }
}

void HttpConnection::read_rest() {
  http::async_read(stream_, buffer_, *parser_,
                   [self = shared_from_this()](boost::beast::error_code error, size_t) { self->on_request(error); });
}

void HttpConnection::on_request(boost::beast::error_code error) {
  if (closed_) return;
  stream_.expires_never();
  const bool bad_request = error && error.category() == http::make_error_code(http::error::bad_target).category() &&
                           error != http::error::end_of_stream && error != http::error::partial_message;
  if (error && !bad_request) return shut();
  answering_ = true;
  begun_ = ended_ = false;
  if (error) {
    keep_alive_ = false;
    head_only_ = false;
    if (error == http::error::body_limit) {
      reply_http_error(
          *this, 413,
          "The request body is larger than " + std::to_string(limits_.max_body_bytes) + " bytes; send less.", "");
    } else if (error == http::error::header_limit || error == http::error::buffer_overflow) {
      reply_http_error(*this, 431, "The request's headers are larger than 32 KiB; send fewer.", "");
    } else {
      reply_http_error(*this, 400, "This is not a valid HTTP/1.1 request: " + error.message() + ".", "");
    }
    return;
  }
  auto message = parser_->release();
  keep_alive_ = message.keep_alive();
  chunked_ = message.version() >= 11;
  head_only_ = message.method() == http::verb::head;
  HttpRequest request;
  request.method = std::string(message.method_string());
  request.target = std::string(message.target());
  request.authorization = std::string(message[http::field::authorization]);
  request.body = std::move(message.body());
  watch_for_close();
  guarded([&] { handler_(std::move(request), *this); });
}

void HttpConnection::guarded(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    spdlog::error("A request failed: {}", error.what());
    work_.reset();
    if (begun_) return shut();
    reply_http_error(*this, 500, std::string("The server failed on this request: ") + error.what() + ".", "");
  }
}

// Reads ahead while an answer is under way: the end of the stream means that the client left.
void HttpConnection::watch_for_close() {
  if (closed_ || watching_ || buffer_.size() >= kMaxReadAhead) return;
  watching_ = true;
  stream_.async_read_some(buffer_.prepare(4096),
                          [self = shared_from_this()](boost::beast::error_code error, size_t bytes) {
                            self->watching_ = false;
                            self->buffer_.commit(bytes);
                            if (self->closed_) return;
                            if (error && error != asio::error::operation_aborted) return self->shut();
                            if (self->answering_) return self->watch_for_close();
                            self->read_request();
                          });
}

void HttpConnection::reply(int status, std::string_view content_type, std::string_view body,
                           std::string_view extra_headers) {
  std::string out = "HTTP/1.1 " + std::to_string(status) + " ";
  out += std::string_view(http::obsolete_reason(static_cast<http::status>(status)));
  out += "\r\nContent-Type: ";
  out += content_type;
  out += "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
  out += extra_headers;
  out += keep_alive_ ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  if (!head_only_) out += body;
  begun_ = ended_ = true;
  enqueue(std::move(out));
}

void HttpConnection::begin_stream() {
  begun_ = true;
  if (!chunked_) keep_alive_ = false;
  std::string out = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n";
  if (chunked_) out += "Transfer-Encoding: chunked\r\n";
  out += keep_alive_ ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
  enqueue(std::move(out));
}

void HttpConnection::write(std::string_view data) {
  if (data.empty() || closed_) return;
  if (unsent_ > limits_.max_unsent_bytes) return shut();
  if (!chunked_) return enqueue(std::string(data));
  char size[20];
  const auto end = std::to_chars(size, size + sizeof(size), data.size(), 16).ptr;
  std::string out;
  out.reserve(data.size() + 24);
  out.append(size, end).append("\r\n").append(data).append("\r\n");
  enqueue(std::move(out));
}

void HttpConnection::end_stream() {
  ended_ = true;
  enqueue(chunked_ ? "0\r\n\r\n" : "");
}

Exchange::Poster HttpConnection::poster() {
  // The poster is kept by engine sinks, which may outlive the server: it shares the context that its strand runs in.
  return [context = context_, executor = stream_.get_executor(), weak = weak_from_this()](std::function<void()> call) {
    asio::post(executor, [weak, call = std::move(call)] {
      if (const auto self = weak.lock(); self != nullptr && !self->closed_) self->guarded(call);
    });
  };
}

void HttpConnection::hold(std::shared_ptr<void> work) {
  if (answering_ && !ended_ && !closed_) work_ = std::move(work);
}

void HttpConnection::enqueue(std::string data) {
  if (closed_) return;
  unsent_ += data.size();
  queue_.push_back(std::move(data));
  if (!writing_) write_next();
}

void HttpConnection::write_next() {
  writing_ = true;
  stream_.expires_after(limits_.timeout);  // of the write; a read that is under way keeps its own
  asio::async_write(stream_, asio::buffer(queue_.front()),
                    [self = shared_from_this()](boost::beast::error_code error, size_t) {
                      self->writing_ = false;
                      if (self->closed_) return;
                      if (error) return self->shut();
                      self->unsent_ -= self->queue_.front().size();
                      self->queue_.pop_front();
                      if (!self->queue_.empty()) return self->write_next();
                      if (self->ended_) self->answer_done();
                    });
}

void HttpConnection::answer_done() {
  work_.reset();
  answering_ = begun_ = ended_ = false;
  if (!keep_alive_) return shut();
  if (watching_) {
    stream_.cancel();  // its handler reads the next request
  } else {
    read_request();
  }
}

void HttpConnection::shut() {
  if (closed_) return;
  closed_ = true;
  work_.reset();
  boost::beast::error_code ignored;
  stream_.socket().shutdown(Tcp::socket::shutdown_both, ignored);
  stream_.cancel();
  stream_.close();
}

}  // namespace tokenspeed::server
