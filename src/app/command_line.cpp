#include "app/command_line.h"

#include <unistd.h>

#include <cstdio>

namespace tokenspeed::app {

int exit_code_of(const Status& status) {
  if (status.ok()) return 0;
  std::fprintf(stderr, "error: %s\n", status.message().c_str());
  return 1;
}

const Style& terminal_style() {
  static const Style style = isatty(STDOUT_FILENO) != 0 ? Style{"\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"} : Style{};
  return style;
}

}  // namespace tokenspeed::app
