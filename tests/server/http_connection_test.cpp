// Connections under clients that do not read, do not finish, or ask for what throws. Limits are small ones here.
#include "server/http_connection.h"

#include <gtest/gtest.h>

#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <stdexcept>
#include <thread>
#include <vector>

#include "server/json_text.h"

namespace tokenspeed::server {
namespace {

namespace asio = boost::asio;
using Tcp = asio::ip::tcp;
using Socket = HttpConnection::Socket;
using namespace std::chrono_literals;

constexpr ConnectionLimits kLimits{.max_body_bytes = 1000, .max_unsent_bytes = 100000, .timeout = 200ms};

// One thread serves every connection, so that a client that stalls it stalls all.
class HttpConnectionTest : public testing::Test {
 protected:
  HttpConnectionTest() : acceptor_(*io_, {asio::ip::make_address("127.0.0.1"), 0}) {
    accept();
    thread_ = std::thread([this] { io_->run(); });
  }
  ~HttpConnectionTest() override {
    // A connection waits in the io_context that it shares: all must close for it to end.
    asio::post(acceptor_.get_executor(), [this] {
      acceptor_.close();
      for (const auto& weak : connections_) {
        if (const auto connection = weak.lock()) connection->close();
      }
    });
    thread_.join();
  }

  void accept() {
    acceptor_.async_accept(asio::make_strand(*io_), [this](boost::system::error_code error, Socket socket) {
      if (error) return;
      auto connection = std::make_shared<HttpConnection>(
          io_, std::move(socket), kLimits,
          [this](HttpRequest&& request, Exchange& exchange) { handle(request, exchange); });
      connection->start();
      connections_.push_back(std::move(connection));
      accept();
    });
  }

  void handle(const HttpRequest& request, Exchange& exchange) {
    if (request.target == "/throw") throw std::runtime_error("no memory");
    if (request.target == "/huge") return exchange.reply(200, "text/plain", std::string(64 << 20, 'x'));
    if (request.target != "/endless") return exchange.reply(200, "text/plain", "ok");
    exchange.begin_stream();
    exchange.hold(std::shared_ptr<void>(nullptr, [this](void*) { released_ = true; }));
    write_on(exchange, exchange.poster());
  }
  void write_on(Exchange& exchange, const Exchange::Poster& post) {
    exchange.write(std::string(10000, 'x'));
    if (!released_) post([this, &exchange, post] { write_on(exchange, post); });
  }

  Tcp::socket ask(const std::string& target) {
    Tcp::socket socket(client_);
    socket.connect(acceptor_.local_endpoint());
    asio::write(socket, asio::buffer("GET " + target + " HTTP/1.1\r\nHost: x\r\n\r\n"));
    return socket;
  }
  static std::string read_all(Tcp::socket& socket) {
    std::string out;
    boost::system::error_code error;
    asio::read(socket, asio::dynamic_buffer(out), error);
    return out;
  }
  static std::string read_some(Tcp::socket& socket) {
    std::string out(4096, '\0');
    out.resize(socket.read_some(asio::buffer(out)));
    return out;
  }

  std::atomic<bool> released_ = false;  // before io_, whose end releases what is left
  std::shared_ptr<asio::io_context> io_ = std::make_shared<asio::io_context>();
  asio::io_context client_;
  Tcp::acceptor acceptor_;
  std::vector<std::weak_ptr<HttpConnection>> connections_;  // on the one thread
  std::thread thread_;
};

TEST_F(HttpConnectionTest, AStreamingClientThatDoesNotReadIsDropped) {
  auto slow = ask("/endless");
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (!released_ && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(1ms);
  EXPECT_TRUE(released_);
}

TEST_F(HttpConnectionTest, AnAnswerThatIsNotTakenIsGivenUpAndStallsNobody) {
  auto slow = ask("/huge");
  auto other = ask("/");
  EXPECT_TRUE(read_some(other).starts_with("HTTP/1.1 200"));
  std::this_thread::sleep_for(2 * kLimits.timeout);
  EXPECT_LT(read_all(slow).size(), size_t{64} << 20);
}

TEST_F(HttpConnectionTest, AnIdleOrTricklingRequestIsGivenUp) {
  Tcp::socket socket(client_);
  socket.connect(acceptor_.local_endpoint());
  asio::write(socket, asio::buffer(std::string("GET / HTT")));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(read_all(socket), "");
  EXPECT_GE(std::chrono::steady_clock::now() - start, kLimits.timeout / 2);
}

TEST_F(HttpConnectionTest, AHandlerThatThrowsIs500AndTheConnectionLivesOn) {
  auto socket = ask("/throw");
  EXPECT_TRUE(read_some(socket).starts_with("HTTP/1.1 500"));
  asio::write(socket, asio::buffer(std::string("GET / HTTP/1.1\r\nHost: x\r\n\r\n")));
  EXPECT_TRUE(read_some(socket).ends_with("ok"));
}

TEST_F(HttpConnectionTest, HeadersAndBodiesAreBounded) {
  auto socket = ask("/" + std::string(40000, 'a'));
  EXPECT_TRUE(read_all(socket).starts_with("HTTP/1.1 431"));
  Tcp::socket body(client_);
  body.connect(acceptor_.local_endpoint());
  asio::write(body, asio::buffer(std::string("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")));
  EXPECT_TRUE(read_all(body).starts_with("HTTP/1.1 413"));
  Tcp::socket old(client_);
  old.connect(acceptor_.local_endpoint());
  asio::write(old, asio::buffer(std::string("GET / HTTP/1.0\r\n\r\n")));
  EXPECT_TRUE(read_all(old).ends_with("ok"));
}

TEST_F(HttpConnectionTest, ABodyThatWaitsForPermissionGetsIt) {
  Tcp::socket socket(client_);
  socket.connect(acceptor_.local_endpoint());
  asio::write(socket, asio::buffer(std::string("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
                                               "Expect: 100-continue\r\nConnection: close\r\n\r\n")));
  EXPECT_EQ(read_some(socket), "HTTP/1.1 100 Continue\r\n\r\n");
  asio::write(socket, asio::buffer(std::string("body")));
  EXPECT_TRUE(read_all(socket).ends_with("ok"));
}

TEST(JsonTextTest, LimitsDepthAndMembers) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_TRUE(json_within_limits(nested(kMaxJsonDepth)));
  EXPECT_FALSE(json_within_limits(nested(kMaxJsonDepth + 1)));
  EXPECT_TRUE(json_within_limits("\"" + nested(300) + "\\\"" + nested(300) + "\""));
  const auto members = [](int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":{\"x\":\":::\"}";
    return "[{" + text + "},{" + text + "}]";
  };
  EXPECT_TRUE(json_within_limits(members(kMaxJsonMembers)));
  EXPECT_FALSE(json_within_limits(members(kMaxJsonMembers + 1)));
  EXPECT_TRUE(json_within_limits("]]]"));
}

TEST(JsonTextTest, EscapesAndRepairs) {
  EXPECT_EQ(json_quoted("a\"\\\n\x01\xc3\xa9\xff"), "\"a\\\"\\\\\\n\\u0001\xc3\xa9\xef\xbf\xbd\"");
}

}  // namespace
}  // namespace tokenspeed::server
