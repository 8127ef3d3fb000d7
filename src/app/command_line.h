// What the subcommands share at their edges: running a body that returns a Status, and styled terminal text.
#pragma once

#include <CLI/CLI.hpp>
#include <string_view>

#include "base/status.h"

namespace tokenspeed::app {

// Prints an error as "error: ..." to stderr. Returns the exit code: 0 when ok, else 1.
int exit_code_of(const Status& status);

// Makes `run` (a callable returning Status) the subcommand's action.
template <typename Run>
void set_action(CLI::App* command, int* exit_code, Run run) {
  command->callback([exit_code, run = std::move(run)]() mutable { *exit_code = exit_code_of(run()); });
}

// Escape sequences on a terminal, nothing when stdout is a file or a pipe.
struct Style {
  std::string_view bold, dim, accent, reset;
};
const Style& terminal_style();

}  // namespace tokenspeed::app
