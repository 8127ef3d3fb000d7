#include <fmt/core.h>

#include <array>
#include <iostream>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/conversation.h"
#include "app/embedded_model.h"
#include "app/serving.h"

namespace tokenspeed::app {
namespace {

struct DemoFlags {
  ModelFlags model;
  ServerFlags server;
  bool exit = false;
  bool interactive = false;
};

constexpr std::array kTurns = {"What time is it in Oslo?", "Great. What is (41 + 170) * 18?",
                               "And what is 18 inches in centimeters?"};

void print_user(std::string_view text) {
  const Style& style = terminal_style();
  fmt::print("\n{}{:<10}{}{}{}{}\n", style.accent, "user", style.reset, style.bold, text, style.reset);
}

Status play(Conversation* conversation) {
  for (const char* turn : kTurns) {
    print_user(turn);
    TS_RETURN_IF_ERROR(conversation->say(turn));
  }
  return {};
}

Status ask_user(Conversation* conversation) {
  fmt::print("\nYour questions, to the same tools (arithmetic, units, the time in a city, files here); Ctrl-D ends.\n");
  for (std::string line; fmt::print("\n> "), std::fflush(stdout), std::getline(std::cin, line);) {
    if (line.empty()) continue;
    const Status status = conversation->say(line);
    if (!status.ok()) fmt::print("error: {}\n", status.message());
  }
  fmt::print("\n");
  return {};
}

void print_address(const Serving& serving, const std::string& address) {
  fmt::print(
      "\nServing {} at {} (a page there lists the endpoints). Try:\n\n"
      "  curl {}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
      "    -d '{{\"model\": \"{}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n\n",
      serving.model_name, address, address, serving.model_name);
}

Status run(DemoFlags& flags) {
  if (!flags.interactive) block_termination_signals();  // while the user types, Ctrl-C simply ends the program
  flags.model.model = kEmbeddedModel;
  flags.server.served_model_name = "tokenspeed-demo";
  TS_ASSIGN_OR_RETURN(const Serving serving, start_serving(flags.model, flags.server));
  const std::string address = fmt::format("http://{}:{}", flags.server.options.host, serving.server->port());
  fmt::print(
      "\nThe demo model is tiny (14 million parameters); its tools here are real and answer from this machine.\n");
  Conversation conversation(
      HttpClient(flags.server.options.host, serving.server->port()),
      {.model = serving.model_name, .system_prompt = "You are the TokenSpeed demo model.", .temperature = 0});
  TS_RETURN_IF_ERROR(play(&conversation));
  if (flags.interactive) TS_RETURN_IF_ERROR(ask_user(&conversation));
  print_address(serving, address);
  Status status;
  if (!flags.exit) {
    fmt::print("Ctrl-C ends.\n");
    std::fflush(stdout);
    status = wait_for_termination(serving);
  }
  serving.server->stop();
  return status;
}

}  // namespace

void add_demo_command(CLI::App& program, int* exit_code) {
  const auto flags = std::make_shared<DemoFlags>();
  CLI::App* command =
      program.add_subcommand("demo", "Serve the demo model, play a conversation with tools against it, keep serving");
  command->add_flag("--exit", flags->exit, "End after the conversation");
  command->add_flag("--interactive", flags->interactive, "Then let me ask own questions");
  add_model_flags(command, &flags->model);
  add_server_flags(command, &flags->server);
  set_action(command, exit_code, [flags] { return run(*flags); });
}

}  // namespace tokenspeed::app
