// A program of named cases: `program NAME` runs one, `program` all of them, `program --list` prints
// the names. Exit status 0: it did what it should; 1: a CHECK failed; 3: the emulator refused it,
// and says why on standard output.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "portable.cuh"

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

using Cases = std::vector<std::pair<const char*, void (*)()>>;

inline int run_cases(const Cases& cases, int argc, char** argv) {
  const bool list = argc > 1 && std::strcmp(argv[1], "--list") == 0;
  bool found = list;
  try {
    for (const auto& [name, run] : cases) {
      if (list) {
        std::printf("%s\n", name);
        continue;
      }
      if (argc > 1 && std::strcmp(argv[1], name) != 0) continue;
      found = true;
      run();
    }
  } catch (const std::exception& error) {
    std::printf("refused: %s\n", error.what());
    return 3;
  }
  if (!found) std::printf("no such case: %s\n", argv[1]);
  return found ? 0 : 2;
}
