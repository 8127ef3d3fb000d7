#include "app/serving.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>

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
  if (model.directory.empty()) {  // a preset: no tokenizer, token-id prompts only
    served.name = name;
    served.max_model_length = reachable_length(capacity);
    served.vocabulary_size = capacity.vocabulary_size;
  } else {
    TS_ASSIGN_OR_RETURN(
        served, server::load_served_model(name, model.directory, reachable_length(capacity), capacity.vocabulary_size));
  }
  if (served.stop_token_ids.empty()) served.stop_token_ids = model.config.eos_token_ids;
  return served;
}

}  // namespace

void add_server_flags(CLI::App* command, ServerFlags* flags) {
  command->add_option("--host", flags->options.host, "Address to listen on");
  command->add_option("--port", flags->options.port, "Port to listen on; 0: any free one");
  command->add_option("--api-key", flags->options.api_key, "Key that /v1 requests must carry; empty: none");
  command->add_option("--served-model-name", flags->served_model_name, "Name of the model in the API");
}

Result<Serving> start_serving(const ModelFlags& model_flags, const ServerFlags& server_flags) {
  const auto start = std::chrono::steady_clock::now();
  Serving serving;
  serving.model_name =
      server_flags.served_model_name.empty() ? default_name(model_flags.model) : server_flags.served_model_name;
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(model_flags));
  TS_ASSIGN_OR_RETURN(auto runner, make_runner(model, model_flags));
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

Result<std::string> demo_model_directory() {
  std::error_code error;
  const auto program = std::filesystem::canonical("/proc/self/exe", error);
  // build/PRESET/tokenspeed, or a copy of build/ elsewhere.
  const std::filesystem::path candidates[] = {TOKENSPEED_SOURCE_DIR, program.parent_path(),
                                              program.parent_path().parent_path(),
                                              program.parent_path().parent_path().parent_path()};
  for (const auto& root : candidates) {
    const auto directory = root / "models" / "demo";
    if (std::filesystem::exists(directory / "config.json", error)) return directory.string();
  }
  return not_found("the demo model is not at " + (candidates[0] / "models" / "demo").string() +
                   " nor beside the program; run it from a clone of the repository");
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

void wait_for_termination() {
  const sigset_t set = termination_signals();
  int received = 0;
  sigwait(&set, &received);
}

}  // namespace tokenspeed::app
