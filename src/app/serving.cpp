#include "app/serving.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <mutex>
#include <thread>

#include "base/log.h"

namespace tokenspeed::app {
namespace {

std::string default_name(const std::string& model) {
  // "models/demo/" is named "demo".
  const auto path = std::filesystem::path(model).lexically_normal();
  return path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
}

// A sequence can grow no longer than the KV pages allow, whatever the model's own limit.
int64_t reachable_length(const runtime::Capacity& capacity) {
  return std::min(int64_t{capacity.max_model_length}, int64_t{capacity.pages} * capacity.page_size);
}

Result<server::ServedModel> describe(const std::string& name, const model::LoadedModel& model,
                                     const runtime::Capacity& capacity) {
  server::ServedModel served;
  if (!model.directory) {  // a preset: no tokenizer, token-id prompts only
    served.name = name;
    served.max_model_length = reachable_length(capacity);
    served.vocabulary_size = capacity.vocabulary_size;
  } else {
    TS_ASSIGN_OR_RETURN(served, server::load_served_model(name, *model.directory, reachable_length(capacity),
                                                          capacity.vocabulary_size));
  }
  if (served.stop_token_ids.empty()) served.stop_token_ids = model.config.eos_token_ids;
  return served;
}

}  // namespace

void add_server_flags(CLI::App* command, ServerFlags* flags) {
  command->add_option("--host", flags->options.host, "Address to listen on");
  command->add_option("--port", flags->options.port, "Port to listen on; 0: any free one")->check(CLI::Range(0, 65535));
  command->add_option("--api-key", flags->options.api_key, "Key that /v1 requests must carry; empty: none");
  command->add_option("--served-model-name", flags->served_model_name, "Name of the model in the API");
}

namespace {

constexpr auto kErrorDelivery = std::chrono::seconds(2);

// The device's fault, if it has failed; told by the thread that runs steps.
std::mutex fault_mutex;
Status first_fault;
Status device_fault() {
  const std::lock_guard lock(fault_mutex);
  return first_fault;
}
void end_on_fault(const Status& fault) {
  spdlog::critical("{}", fault.message());
  {
    const std::lock_guard lock(fault_mutex);
    first_fault = fault;
  }
  kill(getpid(), SIGTERM);  // ends the program, or wakes wait_for_termination()
}

}  // namespace

Result<Serving> start_serving(const ModelFlags& model_flags, const ServerFlags& server_flags) {
  const auto start = std::chrono::steady_clock::now();
  Serving serving;
  serving.model_name =
      server_flags.served_model_name.empty() ? default_name(model_flags.model) : server_flags.served_model_name;
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(model_flags));
  TS_ASSIGN_OR_RETURN(auto runner, make_runner(model, model_flags, end_on_fault));
  TS_ASSIGN_OR_RETURN(server::ServedModel served, describe(serving.model_name, model, runner->capacity()));
  const runtime::Capacity capacity = runner->capacity();
  spdlog::info("{}: {} requests at once, {} tokens of context, room for {} tokens in the KV cache", serving.model_name,
               capacity.max_sequences, served.max_model_length, int64_t{capacity.pages} * capacity.page_size);
  serving.engine = std::make_unique<engine::Engine>(std::move(runner), engine::EngineOptions{});
  TS_ASSIGN_OR_RETURN(serving.server, server::Server::start(server_flags.options, std::move(served), *serving.engine));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  spdlog::info("ready after {:.1f} s at http://{}:{}", seconds.count(), server_flags.options.host,
               serving.server->port());
  return serving;
}

namespace {
sigset_t termination_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}
}  // namespace

void block_termination_signals() {
  const sigset_t set = termination_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

Status wait_for_termination(const Serving& serving) {
  const sigset_t set = termination_signals();
  int received = 0;
  sigwait(&set, &received);
  Status fault = device_fault();
  if (fault.ok()) return {};
  const auto deadline = std::chrono::steady_clock::now() + kErrorDelivery;
  const auto busy = [&] {
    const engine::Statistics statistics = serving.engine->statistics();
    return statistics.running + statistics.waiting > 0;
  };
  while (busy() && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(kErrorDelivery / 100);
  std::this_thread::sleep_for(kErrorDelivery / 10);  // what has been written is on its way
  return fault;
}

}  // namespace tokenspeed::app
