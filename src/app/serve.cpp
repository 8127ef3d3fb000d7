#include "app/command_line.h"
#include "app/commands.h"
#include "app/serving.h"
#include "base/log.h"

namespace tokenspeed::app {

void add_serve_command(CLI::App& program, int* exit_code) {
  struct Flags {
    ModelFlags model;
    ServerFlags server;
  };
  const auto flags = std::make_shared<Flags>();
  CLI::App* command = program.add_subcommand("serve", "Serve a model over OpenAI's HTTP API");
  command->add_option("model", flags->model.model, "Directory of a checkpoint, demo, or the name of a preset")
      ->required();
  add_model_flags(command, &flags->model);
  add_server_flags(command, &flags->server);
  set_action(command, exit_code, [flags]() -> Status {
    block_termination_signals();
    TS_ASSIGN_OR_RETURN(const Serving serving, start_serving(flags->model, flags->server));
    Status status = wait_for_termination(serving);
    spdlog::info("stopping: running requests are cancelled");
    serving.server->stop();
    return status;
  });
}

}  // namespace tokenspeed::app
