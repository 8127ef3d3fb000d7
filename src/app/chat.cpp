#include <fmt/core.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/conversation.h"
#include "app/embedded_model.h"
#include "app/local_tools.h"
#include "app/serving.h"

namespace tokenspeed::app {
namespace {

struct ChatFlags {
  ModelFlags model;
  ServerFlags server;
  std::string system_prompt;
  double temperature = -1;
  int max_tokens = 1024;
  bool no_tools = false;
};

void print_help() {
  fmt::print(
      "/help          this list\n"
      "/tools         the tools offered to the model; /tools on, /tools off\n"
      "/reset         forget the conversation\n"
      "/quit          end (Ctrl-D too)\n");
}

void tools_command(const std::string& line, Conversation* conversation) {
  if (line == "/tools on" || line == "/tools off") conversation->set_tools(line == "/tools on");
  fmt::print("tools are {}\n", conversation->tools() ? "on" : "off");
  for (const auto& tool : local_tool_schemas()) {
    fmt::print("  {:<15}{}\n", tool["function"]["name"].get<std::string>(),
               tool["function"]["description"].get<std::string>());
  }
}

// False when the user wants to leave.
bool handle_line(const std::string& line, Conversation* conversation) {
  if (line == "/quit" || line == "/exit") return false;
  if (line == "/help") {
    print_help();
  } else if (line.starts_with("/tools")) {
    tools_command(line, conversation);
  } else if (line == "/reset") {
    conversation->forget();
    fmt::print("forgotten\n");
  } else if (line.starts_with("/")) {
    fmt::print("there is no command {}; /help lists them\n", line);
  } else if (!line.empty()) {
    const Status status = conversation->say(line);
    if (!status.ok()) fmt::print("error: {}\n", status.message());
  }
  return true;
}

Status run(ChatFlags& flags) {
  flags.server.options.port = 0;  // a private server on any free port
  TS_ASSIGN_OR_RETURN(const Serving serving, start_serving(flags.model, flags.server));
  ConversationOptions options = {.model = serving.model_name,
                                 .system_prompt = flags.system_prompt,
                                 .tools = !flags.no_tools,
                                 .max_tokens = flags.max_tokens};
  if (flags.temperature >= 0) options.temperature = flags.temperature;
  Conversation conversation(HttpClient("127.0.0.1", serving.server->port()), std::move(options));
  fmt::print("Chatting with {}; /help lists commands.\n", serving.model_name);
  for (std::string line; fmt::print("\n> "), std::fflush(stdout), std::getline(std::cin, line);) {
    if (!handle_line(line, &conversation)) break;
  }
  serving.server->stop();
  return {};
}

}  // namespace

void add_chat_command(CLI::App& program, int* exit_code) {
  const auto flags = std::make_shared<ChatFlags>();
  flags->model.model = kEmbeddedModel;
  CLI::App* command = program.add_subcommand("chat", "Chat with a model on this terminal");
  command->add_option("model", flags->model.model, "Directory of a checkpoint, demo, or the name of a preset");
  command->add_option("--system", flags->system_prompt, "System prompt");
  command->add_option("--temperature", flags->temperature, "Sampling temperature; -1: the model's default");
  command->add_option("--max-tokens", flags->max_tokens, "Greatest length of one answer")->check(CLI::PositiveNumber);
  command->add_flag("--no-tools", flags->no_tools, "Offer no local tools");
  add_model_flags(command, &flags->model);
  set_action(command, exit_code, [flags] { return run(*flags); });
}

}  // namespace tokenspeed::app
