// What every handler of one server shares; lives as long as the server.
#pragma once

#include <atomic>
#include <cstdint>

#include "server/metrics.h"
#include "server/server.h"

namespace tokenspeed::server {

struct ServerContext {
  ServerContext(ServerOptions server_options, ServedModel served, engine::Engine& served_engine)
      : options(std::move(server_options)), model(std::move(served)), engine(served_engine), metrics(model.name) {}
  const ServerOptions options;
  const ServedModel model;
  engine::Engine& engine;
  Metrics metrics;
  std::atomic<uint64_t> requests{0};
};

}  // namespace tokenspeed::server
