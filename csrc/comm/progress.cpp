#include "progress.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>

#include <mutex>

namespace two_level_mha {

namespace {

// One of each for the process: the thread that reads is not the one that exchanges.
struct Shared {
  std::mutex mutex;
  Progress progress;
  FailureHandler handler;
};

Shared& shared() {
  static Shared* found = new Shared;  // never destroyed: threads of a process that ends may still exchange
  return *found;
}

void begin(const Group& group, const char* kind) {
  const bool backward = torch::autograd::get_current_graph_task_id() != -1;
  std::lock_guard<std::mutex> lock(shared().mutex);
  Progress& now = shared().progress;
  now.layer = group.layer;
  now.exchange = std::string(kind) + " over the " + group.axis;
  now.backward = backward;
  now.waiting = true;
}

void end() {
  std::lock_guard<std::mutex> lock(shared().mutex);
  shared().progress.waiting = false;
}

// `waiting` stays: this is where the process was when it failed.
void failed(const Group& group, const std::string& error) {
  FailureHandler handler;
  {
    std::lock_guard<std::mutex> lock(shared().mutex);
    handler = shared().handler;
  }
  if (handler) handler(group.name, error);
}

}  // namespace

Progress progress() {
  std::lock_guard<std::mutex> lock(shared().mutex);
  return shared().progress;
}

void set_failure_handler(FailureHandler handler) {
  std::lock_guard<std::mutex> lock(shared().mutex);
  shared().handler = std::move(handler);
}

void in_exchange(const Group& group, const char* kind, const std::function<void()>& exchange) {
  begin(group, kind);
  try {
    exchange();
  } catch (const c10::ValueError&) {
    throw;  // an argument that does not fit, not a failure
  } catch (const std::exception& error) {
    failed(group, error.what());
    throw;
  }
  end();
}

}  // namespace two_level_mha
