// Server CPU per streamed token: server_bench [STREAMS]. A child process reads STREAMS (default 8) streamed answers at
// a time; the engine's runner gives its tokens at once, so what this process uses is the HTTP server, the text work and
// the engine's bookkeeping (all its threads, kernel time included). Best of kRounds.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "base/mapped_file.h"
#include "server/server.h"

namespace {

using namespace tokenspeed;
using Tcp = boost::asio::ip::tcp;
constexpr int kRounds = 5;
constexpr int kTokens = 4000;
constexpr int32_t kVocabulary = 8192;
const std::string kSource = TOKENSPEED_SOURCE_DIR;

// Says a text again and again.
class TalkingRunner final : public runtime::Runner {
 public:
  explicit TalkingRunner(std::vector<int32_t> tokens) : tokens_(std::move(tokens)) {}
  const runtime::Capacity& capacity() const override { return capacity_; }
  Status submit(std::span<const runtime::SequenceStep> sequences) override {
    results_.clear();
    for (const auto& sequence : sequences) {
      runtime::SequenceResult result;
      if (sequence.sample) result.token = tokens_[sequence.output.size() % tokens_.size()];
      results_.push_back(std::move(result));
    }
    return {};
  }
  Status wait(std::vector<runtime::SequenceResult>* results) override {
    *results = std::move(results_);
    return {};
  }

 private:
  std::vector<int32_t> tokens_;
  runtime::Capacity capacity_{.pages = 1 << 16,
                              .page_size = 16,
                              .state_slots = 256,
                              .max_step_tokens = 2048,
                              .max_sequences = 64,
                              .max_model_length = 8192,
                              .vocabulary_size = kVocabulary};
  std::vector<runtime::SequenceResult> results_;
};

void read_stream(uint16_t port, const std::string& path, const std::string& body) {
  boost::asio::io_context io;
  Tcp::socket socket(io);
  socket.connect({boost::asio::ip::make_address("127.0.0.1"), port});
  boost::asio::write(
      socket, boost::asio::buffer("POST " + path + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: " +
                                  std::to_string(body.size()) + "\r\n\r\n" + body));
  std::string out;
  boost::system::error_code error;
  boost::asio::read(socket, boost::asio::dynamic_buffer(out), error);
  if (!out.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n")) std::fprintf(stderr, "%s\n", out.substr(0, 400).c_str());
}

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double microseconds_per_token(int streams, const char* path, const char* body) {
  int to_child[2];
  if (pipe(to_child) != 0) std::abort();
  const pid_t child = fork();  // before this process has threads
  if (child == 0) {
    uint16_t port = 0;
    if (read(to_child[0], &port, sizeof port) != sizeof port) _exit(1);
    {
      std::vector<std::jthread> threads;
      for (int i = 0; i < streams; ++i) threads.emplace_back([=] { read_stream(port, path, body); });
    }
    _exit(0);
  }
  auto model = server::load_served_model("demo", kSource + "/models/demo", 8192, kVocabulary).value();
  auto tokens = model.tokenizer->encode(read_file(kSource + "/models/demo/README.md").value()).value();
  engine::Engine engine(std::make_unique<TalkingRunner>(std::move(tokens)), {});
  const auto server = server::Server::start({.port = 0}, std::move(model), engine).value();
  const uint16_t port = server->port();
  const double before = cpu_seconds();
  if (write(to_child[1], &port, sizeof port) != sizeof port) std::abort();
  waitpid(child, nullptr, 0);
  const double used = cpu_seconds() - before;
  close(to_child[0]);
  close(to_child[1]);
  return used * 1e6 / (static_cast<double>(streams) * kTokens);
}

}  // namespace

int main(int argc, char** argv) {
  const int streams = argc > 1 ? std::atoi(argv[1]) : 8;
  if (streams < 1 || streams > 64) {
    std::fprintf(stderr, "usage: server_bench [STREAMS from 1 to 64]\n");
    return 2;
  }
  constexpr const char* kCompletion = R"({"prompt":"a","stream":true,"ignore_eos":true,"max_tokens":4000})";
  constexpr const char* kChat =
      R"({"messages":[{"role":"user","content":"a"}],"stream":true,"ignore_eos":true,"max_tokens":4000,
          "tools":[{"type":"function","function":{"name":"f"}}]})";
  for (const auto& [path, body] :
       {std::pair{"/v1/completions", kCompletion}, std::pair{"/v1/chat/completions", kChat}}) {
    double best = 1e9;
    for (int round = 0; round < kRounds; ++round) best = std::min(best, microseconds_per_token(streams, path, body));
    std::printf("%s, %d streams: %.1f us of CPU per token\n", path, streams, best);
  }
  return 0;
}
