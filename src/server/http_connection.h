// One client's connection: reads requests one after the other (keep-alive; pipelined ones wait), writes answers from a
// queue. All of it runs on one strand. While an answer is under way the socket is read ahead, which is how a client
// that leaves is noticed. Invariant: at most max_unsent_bytes wait for a streaming client; one that does not read is
// dropped. A handler that throws costs its own client the answer and nobody else anything.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core/basic_stream.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "server/exchange.h"

namespace tokenspeed::server {

struct ConnectionLimits {
  size_t max_body_bytes = 64 << 20;
  size_t max_unsent_bytes = 4 << 20;
  // Of a request to arrive (idle keep-alive included), and of a write to be taken by the client's side.
  std::chrono::milliseconds timeout = std::chrono::seconds(120);
};

class HttpConnection final : public Exchange, public std::enable_shared_from_this<HttpConnection> {
 public:
  using Handler = std::function<void(HttpRequest&&, Exchange&)>;
  using Tcp = boost::asio::ip::tcp;
  using Strand = boost::asio::strand<boost::asio::io_context::executor_type>;
  using Socket = Tcp::socket::rebind_executor<Strand>::other;

  HttpConnection(std::shared_ptr<boost::asio::io_context> context, Socket socket, ConnectionLimits limits,
                 Handler handler);
  void start();
  void close();  // from any thread

  void reply(int status, std::string_view content_type, std::string_view body, std::string_view extra_headers) override;
  void begin_stream() override;
  void write(std::string_view data) override;
  void end_stream() override;
  Poster poster() override;
  void hold(std::shared_ptr<void> work) override;

 private:
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  void read_request();
  void read_body();
  void read_rest();
  void on_request(boost::beast::error_code error);
  void guarded(const std::function<void()>& call);
  void watch_for_close();
  void enqueue(std::string data);
  void write_next();
  void answer_done();
  void shut();

  std::shared_ptr<boost::asio::io_context> context_;
  boost::beast::basic_stream<Tcp, Strand> stream_;
  const ConnectionLimits limits_;
  const Handler handler_;
  boost::beast::flat_buffer buffer_;
  std::optional<Parser> parser_;
  std::deque<std::string> queue_;
  size_t unsent_ = 0;
  std::shared_ptr<void> work_;
  bool writing_ = false;
  bool answering_ = false;  // between a request and the end of its answer
  bool begun_ = false;      // the answer's head is in the queue
  bool ended_ = false;      // the answer is all in the queue
  bool watching_ = false;
  bool head_only_ = false;
  bool keep_alive_ = true;
  bool chunked_ = true;
  bool closed_ = false;
};

}  // namespace tokenspeed::server
