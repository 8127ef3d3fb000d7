// Chat requests to prompts without a server: what /v1/chat/completions would give the model.
#pragma once

#include <string>

#include "base/status.h"
#include "text/chat_template.h"

namespace tokenspeed::server {

// `request_json` is the body of a chat request; messages, tools and chat_template_kwargs are read. The generation
// prompt is added unless the request says "add_generation_prompt": false. Errors: as the endpoint answers them.
Result<std::string> render_chat_request(const text::ChatTemplate& chat_template, const std::string& request_json);

}  // namespace tokenspeed::server
