#include "server/server.h"

#include <algorithm>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <mutex>
#include <thread>

#include "base/log.h"
#include "server/http_connection.h"
#include "server/router.h"
#include "server/server_context.h"

namespace tokenspeed::server {
namespace {

namespace asio = boost::asio;
using Tcp = asio::ip::tcp;
using Socket = HttpConnection::Socket;
constexpr auto kAcceptRetry = std::chrono::milliseconds(100);

}  // namespace

class Server::Impl {
 public:
  Impl(ServerOptions options, ServedModel model, engine::Engine& engine)
      : context_(std::move(options), std::move(model), engine),
        io_(std::make_shared<asio::io_context>()),
        acceptor_(asio::make_strand(*io_)) {}
  ~Impl() { stop(); }

  Status bind() {
    const ServerOptions& options = context_.options;
    boost::system::error_code error;
    Tcp::resolver resolver(*io_);
    const auto found = resolver.resolve(options.host, std::to_string(options.port), error);
    if (error || found.empty()) {
      return invalid_argument("The host '" + options.host + "' has no address (" + error.message() +
                              "); give another with --host.")
          .with_param("host");
    }
    const Tcp::endpoint endpoint = found.begin()->endpoint();
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (error) {
      const bool taken = error == asio::error::address_in_use;
      return failed_precondition("Port " + std::to_string(options.port) + " on " + options.host +
                                 (taken ? " is in use" : " cannot be bound (" + error.message() + ")") +
                                 "; choose another with --port, or stop the program that has it.");
    }
    port_ = acceptor_.local_endpoint(error).port();
    return {};
  }

  void run() {
    accept();
    const unsigned threads = std::clamp(std::thread::hardware_concurrency(), 2u, 8u);
    for (unsigned i = 0; i < threads; ++i) {
      threads_.emplace_back([this] { io_->run(); });
    }
  }

  void stop() {
    const std::lock_guard lock(stop_mutex_);
    if (stopped_) return;
    stopped_ = true;
    // Connections close on their strands, so that their requests are cancelled before the context stops.
    asio::post(acceptor_.get_executor(), [this] {
      boost::system::error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      for (const auto& weak : connections_) {
        if (const auto connection = weak.lock()) connection->close();
      }
      guard_.reset();
    });
    for (std::thread& thread : threads_) thread.join();
  }

  uint16_t port() const { return port_; }

 private:
  void accept() {
    acceptor_.async_accept(asio::make_strand(*io_), [this](boost::system::error_code error, Socket socket) {
      if (!acceptor_.is_open()) return;
      if (!error) add(std::move(socket));
      if (!error) return accept();
      // Out of file descriptors, most likely: waiting for connections to end beats spinning.
      retry_.expires_after(kAcceptRetry);
      retry_.async_wait([this](boost::system::error_code cancelled) {
        if (!cancelled && acceptor_.is_open()) accept();
      });
    });
  }

  void add(Socket socket) {
    std::erase_if(connections_, [](const auto& weak) { return weak.expired(); });
    auto connection = std::make_shared<HttpConnection>(
        io_, std::move(socket), ConnectionLimits{.max_body_bytes = context_.options.max_body_bytes},
        [this](HttpRequest&& request, Exchange& exchange) { route(context_, std::move(request), exchange); });
    connections_.push_back(connection);
    connection->start();
  }

  ServerContext context_;
  std::shared_ptr<asio::io_context> io_;
  asio::executor_work_guard<asio::io_context::executor_type> guard_ = asio::make_work_guard(*io_);
  Tcp::acceptor acceptor_;
  asio::steady_timer retry_{acceptor_.get_executor()};
  std::vector<std::weak_ptr<HttpConnection>> connections_;  // on the acceptor's strand
  std::vector<std::thread> threads_;
  std::mutex stop_mutex_;
  bool stopped_ = false;
  uint16_t port_ = 0;
};

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Server::~Server() = default;
uint16_t Server::port() const { return impl_->port(); }
void Server::stop() { impl_->stop(); }

Result<std::unique_ptr<Server>> Server::start(ServerOptions options, ServedModel model, engine::Engine& engine) {
  auto impl = std::make_unique<Impl>(std::move(options), std::move(model), engine);
  TS_RETURN_IF_ERROR(impl->bind());
  impl->run();
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

}  // namespace tokenspeed::server
