#include "app/embedded_model.h"

#include <array>

#include "model/config.h"
#include "model/loader.h"

// The assembler copies the files into a section of their own: no compiler has to read 29 MB of numbers. They begin on
// pages, so tensors are aligned as they are in a mapped file and the system can be advised about them.
#define TS_EMBED(symbol, file)                         \
  asm(".section .embedded_model, \"a\", @progbits\n"   \
      ".balign 4096\n"                                 \
      "ts_embedded_" #symbol                           \
      ":\n"                                            \
      ".incbin \"" TOKENSPEED_DEMO_MODEL "/" file      \
      "\"\n"                                           \
      "ts_embedded_" #symbol                           \
      "_end:\n"                                        \
      ".previous\n");                                  \
  extern "C" {                                         \
  extern const std::byte ts_embedded_##symbol[];       \
  extern const std::byte ts_embedded_##symbol##_end[]; \
  }

TS_EMBED(config, "config.json")
TS_EMBED(generation_config, "generation_config.json")
TS_EMBED(tokenizer, "tokenizer.json")
TS_EMBED(tokenizer_config, "tokenizer_config.json")
TS_EMBED(chat_template, "chat_template.jinja")
TS_EMBED(weights, "model.safetensors")

namespace tokenspeed::app {
namespace {

const std::array kFiles = {
    EmbeddedFile{"config.json", {ts_embedded_config, ts_embedded_config_end}},
    EmbeddedFile{"generation_config.json", {ts_embedded_generation_config, ts_embedded_generation_config_end}},
    EmbeddedFile{"tokenizer.json", {ts_embedded_tokenizer, ts_embedded_tokenizer_end}},
    EmbeddedFile{"tokenizer_config.json", {ts_embedded_tokenizer_config, ts_embedded_tokenizer_config_end}},
    EmbeddedFile{"chat_template.jinja", {ts_embedded_chat_template, ts_embedded_chat_template_end}},
    EmbeddedFile{"model.safetensors", {ts_embedded_weights, ts_embedded_weights_end}},
};

}  // namespace

const Directory* embedded_model(const std::string& model) {
  static const Directory demo = Directory::embedded(kEmbeddedModel, kFiles);
  return model == kEmbeddedModel ? &demo : nullptr;
}

Directory model_directory(const std::string& model) {
  const Directory* embedded = embedded_model(model);
  return embedded ? *embedded : Directory(model);
}

Result<compile::ModelConfig> load_model_config(const std::string& model) {
  const Directory* embedded = embedded_model(model);
  return embedded ? model::load_config(*embedded) : model::load_model_config(model);
}

}  // namespace tokenspeed::app
