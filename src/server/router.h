// Finds the handler of a request: checks the key, the path and the method, and answers what has no handler.
#pragma once

#include "server/exchange.h"
#include "server/server_context.h"

namespace tokenspeed::server {

void route(ServerContext& context, HttpRequest&& request, Exchange& exchange);

// The handlers (models.cpp, tokenize.cpp, completions.cpp, index_page.cpp).
void handle_chat_completions(ServerContext& context, const HttpRequest& request, Exchange& exchange);
void handle_completions(ServerContext& context, const HttpRequest& request, Exchange& exchange);
void handle_tokenize(ServerContext& context, const HttpRequest& request, Exchange& exchange);
void handle_detokenize(ServerContext& context, const HttpRequest& request, Exchange& exchange);
std::string models_json(const ServerContext& context);
std::string model_json(const ServerContext& context);
std::string index_page(const ServerContext& context);

}  // namespace tokenspeed::server
