#include <fmt/core.h>

#include "app/command_line.h"
#include "app/commands.h"

namespace tokenspeed::app {

void add_version_command(CLI::App& program, int* exit_code) {
  CLI::App* command = program.add_subcommand("version", "Print the version");
  set_action(command, exit_code, []() -> Status {
    fmt::print("tokenspeed {}\n", TOKENSPEED_VERSION);
    return {};
  });
}

}  // namespace tokenspeed::app
