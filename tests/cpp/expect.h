// For programs that try many random cases: the first that is wrong ends them, by its number.
#pragma once

#include <cstdio>
#include <cstdlib>

inline void expect(bool right, const char* what, int seed) {
  if (right) return;
  std::printf("wrong: %s, case %d\n", what, seed);
  std::exit(1);
}
