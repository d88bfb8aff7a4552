// Where this process is among its exchanges, for a thread that tells the other ranks, and for messages.
#pragma once

#include <functional>
#include <string>

#include "group.h"

namespace two_level_mha {

struct Progress {
  std::string
      layer;  // of the last exchange that was begun, and what it was: "all_to_all over the slice axis"
  std::string exchange;
  bool backward = false;
  bool waiting = false;  // it has not come back
};

Progress progress();

// What is told of an exchange that failed: the name of its group, and the error's text. It may throw in place of
// the error, as a handler of Python does.
using FailureHandler = std::function<void(const std::string& group, const std::string& error)>;

void set_failure_handler(FailureHandler handler);

// Runs one exchange of a group, or the wait for it, and keeps `progress`.
void in_exchange(const Group& group, const char* kind, const std::function<void()>& exchange);

}  // namespace two_level_mha
