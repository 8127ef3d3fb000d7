// The subcommands of the program. Each function adds one to the command line; when the user chose it, running it stores
// the process's exit code in *exit_code. Errors are printed to stderr as one sentence.
#pragma once

#include <CLI/CLI.hpp>

namespace tokenspeed::app {

void add_serve_command(CLI::App& program, int* exit_code);
void add_demo_command(CLI::App& program, int* exit_code);
void add_chat_command(CLI::App& program, int* exit_code);
void add_bench_command(CLI::App& program, int* exit_code);
void add_plan_command(CLI::App& program, int* exit_code);
void add_tokenize_command(CLI::App& program, int* exit_code);
void add_render_command(CLI::App& program, int* exit_code);
void add_version_command(CLI::App& program, int* exit_code);

}  // namespace tokenspeed::app
