// Chat messages and tools: checked, and brought into the shape that chat templates expect.
#pragma once

#include "server/generation.h"

namespace tokenspeed::server {

// The messages for the template: developer becomes system, text parts one string, argument strings objects.
Result<Json> read_messages(const Json& body);
// Renders {"messages", "tools", chat_template_kwargs} of a body, with the generation prompt when asked for.
Result<std::string> render_chat(const ServedModel& model, const Json& body, const Json& tools, bool generation_prompt);
Result<GenerationRequest> read_chat_request(const ServerContext& context, const std::string& body);

}  // namespace tokenspeed::server
