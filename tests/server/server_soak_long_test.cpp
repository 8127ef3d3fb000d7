// A minute of loopback traffic: clients that ask properly, and beside them clients that leave in the middle, do not
// read, send slowly, send rubbish or ask for what is refused. Every proper request gets its whole answer throughout,
// and afterwards nothing is left: no request in the engine, no page held, no descriptor open.
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <functional>
#include <random>

#include "base/log.h"
#include "server/server_fixture.h"

namespace tokenspeed::server {
namespace {

using namespace std::chrono_literals;
using Random = std::mt19937_64;

constexpr uint64_t kSeed = 20261125;
constexpr auto kDuration = 45s;
constexpr int kGoodClients = 4;
constexpr int kBadClients = 6;
constexpr int kLeastGoodAnswers = 500;
constexpr auto kPatience = 60s;

uint64_t below(Random& random, uint64_t limit) { return random() % limit; }

class ServerSoak : public ServerTest {
 protected:
  using Clock = std::chrono::steady_clock;

  // A connection whose reads give up, so that no test client waits for ever.
  Tcp::socket patient_socket(boost::asio::io_context& io) {
    Tcp::socket socket(io);
    socket.connect({boost::asio::ip::make_address("127.0.0.1"), server_->port()});
    const timeval limit = {.tv_sec = std::chrono::seconds(kPatience).count(), .tv_usec = 0};
    setsockopt(socket.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    return socket;
  }
  Answer ask(const std::string& path, const std::string& body) {
    boost::asio::io_context io;
    Tcp::socket socket = patient_socket(io);
    boost::system::error_code error;
    boost::asio::write(socket, boost::asio::buffer(head("POST", path, body.size(), "close") + body), error);
    std::string out;
    boost::asio::read(socket, boost::asio::dynamic_buffer(out), error);
    EXPECT_EQ(error, boost::asio::error::eof) << "no whole answer: " << out.substr(0, 300);
    return out.size() > 12 ? parse_answer(out) : Answer{};
  }

  void ask_streamed(const std::string& expected) {
    const Answer answer = ask("/v1/chat/completions", chat({{"stream", true}, {"max_tokens", 200}}).dump());
    EXPECT_EQ(answer.status, 200) << answer.body;
    std::string text;
    for (const Json& event : events(answer)) {
      for (const Json& choice : event["choices"]) text += choice["delta"].value("content", "");
    }
    EXPECT_EQ(text, expected);
    EXPECT_NE(answer.body.find("[DONE]"), std::string::npos);
  }
  void ask_whole(const std::string& expected) {
    const Answer answer = ask("/v1/chat/completions", chat({{"max_tokens", 200}}).dump());
    EXPECT_EQ(answer.status, 200) << answer.body;
    const Json json = Json::parse(answer.body, nullptr, false);
    ASSERT_TRUE(json.is_object()) << answer.body;
    EXPECT_EQ(json["choices"][0]["message"]["content"], expected);
  }
  void ask_refused() {
    const Answer answer = ask("/v1/chat/completions", chat({{"temperature", -1}}).dump());
    EXPECT_EQ(answer.status, 400);
    EXPECT_EQ(Json::parse(answer.body, nullptr, false)["error"]["param"], "temperature");
  }

  void good_client(Random random, const std::string& text) {
    while (Clock::now() < end_ && !HasFailure()) {
      switch (below(random, 4)) {
        case 0:
          ask_whole(text);
          break;
        case 1:
          ask_refused();
          break;
        default:
          ask_streamed(text);
      }
      ++good_answers_;
    }
  }

  std::string request(Random& random) {
    const std::string body = chat({{"stream", below(random, 2) == 0}, {"max_tokens", 1 + below(random, 1500)}}).dump();
    return head("POST", "/v1/chat/completions", body.size(), "keep-alive") + body;
  }
  static std::string rubbish(Random& random, std::string bytes) {
    for (uint64_t i = 1 + below(random, 20); i > 0; --i) {
      bytes[below(random, bytes.size())] = static_cast<char>(below(random, 256));
    }
    return bytes;
  }

  void misbehave(Random& random) {
    boost::asio::io_context io;
    Tcp::socket socket = patient_socket(io);
    boost::system::error_code error;
    const std::string bytes = request(random);
    const auto send = [&](std::string_view part) {
      boost::asio::write(socket, boost::asio::buffer(part.data(), part.size()), error);
    };
    switch (below(random, 6)) {
      case 0:  // leaves while asking
        send(std::string_view(bytes).substr(0, below(random, bytes.size())));
        break;
      case 1: {  // leaves while being answered
        send(bytes);
        std::array<char, 200> some;
        socket.read_some(boost::asio::buffer(some), error);
        break;
      }
      case 2:  // asks much and reads nothing for a while
        for (int i = 0; i < 20; ++i) send(bytes);
        std::this_thread::sleep_for(std::chrono::milliseconds(below(random, 500)));
        break;
      case 3:  // sends byte by byte
        for (size_t i = 0; i < std::min<size_t>(bytes.size(), 200) && !error; ++i) {
          send(std::string_view(bytes).substr(i, 1));
          std::this_thread::sleep_for(500us);
        }
        break;
      case 4:  // rubbish in the head, the body or anywhere
        send(rubbish(random, bytes));
        std::this_thread::sleep_for(std::chrono::milliseconds(below(random, 20)));
        break;
      default:  // a head or a body that is too large
        send(below(random, 2) == 0 ? "GET /" + std::string(100'000, 'a') + " HTTP/1.1\r\n\r\n"
                                   : head("POST", "/v1/chat/completions", size_t{1} << 40, "close"));
    }
    if (below(random, 2) == 0) {  // an abrupt end instead of an orderly one
      const linger now = {.l_onoff = 1, .l_linger = 0};
      setsockopt(socket.native_handle(), SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    }
    ++misdeeds_;
  }
  void bad_client(Random random) {
    while (Clock::now() < end_ && !HasFailure()) misbehave(random);
  }

  static int64_t open_descriptors() {
    const std::filesystem::directory_iterator all("/proc/self/fd");
    return std::distance(begin(all), std::filesystem::end(all));
  }
  static bool within(std::chrono::seconds limit, const std::function<bool()>& holds) {
    const auto end = Clock::now() + limit;
    while (!holds() && Clock::now() < end) std::this_thread::sleep_for(10ms);
    return holds();
  }

  Clock::time_point end_;
  std::atomic<int> good_answers_ = 0;
  std::atomic<int> misdeeds_ = 0;
};

TEST_F(ServerSoak, ProperRequestsAreAnsweredWhateverOthersDo) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  spdlog::set_level(spdlog::level::off);
  const std::string text = "An answer of some length, with caf\u00e9s and \u65e5\u672c in it; the same for everybody.";
  say("</think>\n\n" + text);
  script_->delay_us = 200;
  ask_whole(text);
  const int64_t descriptors = open_descriptors();
  end_ = Clock::now() + kDuration;
  std::vector<std::thread> threads;
  for (int i = 0; i < kGoodClients; ++i) threads.emplace_back([&, i] { good_client(Random(kSeed + i), text); });
  for (int i = 0; i < kBadClients; ++i) threads.emplace_back([&, i] { bad_client(Random(kSeed + 100 + i)); });
  for (std::thread& thread : threads) thread.join();
  RecordProperty("good_answers", good_answers_);
  RecordProperty("misdeeds", misdeeds_);
  EXPECT_GT(good_answers_, kLeastGoodAnswers);
  EXPECT_GT(misdeeds_, kLeastGoodAnswers);
  EXPECT_TRUE(idle_within(10s)) << "requests of clients that left still run";
  EXPECT_EQ(engine_->statistics().kv_cache_usage, 0);
  EXPECT_TRUE(within(10s, [&] { return open_descriptors() <= descriptors; })) << "connections are left open";
  EXPECT_EQ(get("/health").status, 200);
}

}  // namespace
}  // namespace tokenspeed::server
