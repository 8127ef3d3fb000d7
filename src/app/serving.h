// From command-line flags to a running server: the model, the engine and the HTTP server. What `serve`, `demo` and
// `chat` have in common.
#pragma once

#include <memory>
#include <string>

#include "app/model_setup.h"
#include "engine/engine.h"
#include "server/server.h"

namespace tokenspeed::app {

struct ServerFlags {
  server::ServerOptions options;
  std::string served_model_name;  // empty: the directory's or preset's name
};
void add_server_flags(CLI::App* command, ServerFlags* flags);

// A model being served. Members are destroyed in reverse order: the server before the engine.
struct Serving {
  std::string model_name;
  std::unique_ptr<engine::Engine> engine;
  std::unique_ptr<server::Server> server;
};
// Ready to answer when it returns. Logs what was loaded, how long it took and where it listens.
Result<Serving> start_serving(const ModelFlags& model, const ServerFlags& server);

// Blocks SIGINT and SIGTERM in this thread and those it starts; call before start_serving.
void block_termination_signals();
// Waits for one of them, or for the fault of the device that ends all serving: then running requests have got their
// errors when it returns that fault.
Status wait_for_termination(const Serving& serving);

}  // namespace tokenspeed::app
