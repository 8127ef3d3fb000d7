#include <CLI/CLI.hpp>
#include <string>

#include "app/commands.h"
#include "base/log.h"

int main(int argc, char** argv) {
  using namespace tokenspeed::app;
  CLI::App program("TokenSpeed: an inference engine for agents, for the Qwen3.5 family.", "tokenspeed");
  program.require_subcommand(1);
  program.get_formatter()->column_width(40);
  program.option_defaults()->always_capture_default();
  std::string log_level = "info";
  program.add_option("--log-level", log_level, "trace, debug, info, warning or error")
      ->check(CLI::IsMember({"trace", "debug", "info", "warning", "error"}));
  program.parse_complete_callback([&log_level] { tokenspeed::initialize_logging(log_level); });

  int exit_code = 0;
  add_serve_command(program, &exit_code);
  add_demo_command(program, &exit_code);
  add_chat_command(program, &exit_code);
  add_bench_command(program, &exit_code);
  add_plan_command(program, &exit_code);
  add_tokenize_command(program, &exit_code);
  add_render_command(program, &exit_code);
  add_version_command(program, &exit_code);
  CLI11_PARSE(program, argc, argv);
  return exit_code;
}
