// The OpenAI-compatible HTTP server over one engine and one model. Requests are parsed, rendered and tokenised on the
// server's threads; tokens arrive as engine events that are posted to the connection's strand, so that neither a slow
// client nor a long prompt holds up the engine. Invariant: a client that leaves, or does not read what it asked for,
// has its requests cancelled. Cost: bounded memory per connection (header, body and unsent output have limits).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/directory.h"
#include "base/status.h"
#include "engine/engine.h"
#include "text/chat_template.h"
#include "text/sorted_vocabulary.h"
#include "text/tokenizer.h"

namespace tokenspeed::server {

struct ServedModel {
  std::string name;
  std::string directory;
  std::optional<text::Tokenizer> tokenizer;                 // none: token-id prompts only
  std::optional<text::SortedVocabulary> sorted_vocabulary;  // the tokenizer's
  std::optional<text::ChatTemplate> chat_template;          // none: no chat
  std::vector<int32_t> stop_token_ids;
  int64_t max_model_length = 0;  // prompt and output together, tokens
  int32_t vocabulary_size = 0;
  struct SamplingDefaults {
    float temperature = 1;
    float top_p = 1;
    int top_k = 0;
    float min_p = 0;
    float repetition_penalty = 1;
    float presence_penalty = 0;
  } defaults;
};

// Reads tokenizer.json, the chat template and generation_config.json of `directory`, each where present.
// Errors: data_loss or invalid_argument naming the file; a tokenizer with more ids than `vocabulary_size`.
Result<ServedModel> load_served_model(const std::string& name, const Directory& directory, int64_t max_model_length,
                                      int32_t vocabulary_size);

struct ServerOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8000;  // 0: any free port
  std::string api_key;   // empty: none is asked for
  size_t max_body_bytes = 64 << 20;
};

class Server {
 public:
  // Bound and serving on its own threads when it returns. `engine` must outlive the server.
  // Errors: failed_precondition (port in use), invalid_argument (no such host address).
  static Result<std::unique_ptr<Server>> start(ServerOptions options, ServedModel model, engine::Engine& engine);
  ~Server();
  uint16_t port() const;
  // Stops accepting, closes every connection (which cancels its requests) and joins the threads. Idempotent.
  void stop();

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tokenspeed::server
