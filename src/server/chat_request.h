// Chat messages and tools: checked, and brought into the shape that chat templates expect.
#pragma once

#include "server/generation.h"

namespace tokenspeed::server {

// The messages for the template: developer becomes system, text parts one string, argument strings objects.
Result<Json> read_messages(const Json& body);
// Checked as an array of functions; an empty array when there are none.
Result<Json> read_tools(const Json& body);
// The model's template. invalid_argument when the model cannot chat.
Result<const text::ChatTemplate*> chat_template_of(const ServedModel& model);
// Renders {"messages", "tools", chat_template_kwargs} of a body, with the generation prompt when asked for.
Result<std::string> render_chat(const text::ChatTemplate& chat_template, const Json& body, const Json& tools,
                                bool generation_prompt);
Result<GenerationRequest> read_chat_request(const ServerContext& context, const std::string& body);

}  // namespace tokenspeed::server
