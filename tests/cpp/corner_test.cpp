// csrc/attend/aten/corner.h, by which ATen's CUDA kernels take a causal call, against visible.h: whether what
// a kernel would show each row is what each row sees. A failure localises keys that a row loses or gains.
#include "../../csrc/attend/aten/corner.h"

#include <cstdio>

using namespace two_level_mha;

namespace {

bool agrees(const Visible& v, int64_t L, int64_t S) {
  const Cut cut(v, L, S);
  if (cut.after > 0) {
    for (int64_t row = cut.before; row < L; ++row)
      if (!(v.keys_of(row, S) == Range{0, S})) return false;
    return !Corner(v, L, S).fits && Corner(v, cut.before, S).fits && Corner({}, cut.after, S).fits &&
           agrees(v, cut.before, S);
  }
  const Corner corner(v, L, S);
  for (int64_t row = 0; corner.fits && row < L; ++row) {
    const int64_t end = corner.first_key + corner.keys - (corner.causal ? L - 1 - row : 0);
    if (!(v.keys_of(row, S) == Range{corner.first_key, end})) return false;
  }
  return true;
}

}  // namespace

int main() {
  int64_t cases = 0, cut = 0;
  for (int64_t L = 1; L <= 5; ++L)
    for (int64_t S = 1; S <= 6; ++S)
      for (int64_t causal = -3; causal <= 8; ++causal)
        for (int64_t window = 0; window <= 3; ++window)
          for (int64_t stride = 1; stride <= 3; ++stride) {
            Visible v{causal, std::nullopt, stride};
            if (window > 0) v.window = window;
            const bool must = causal >= 0 && window == 0 && (stride == 1 || L == 1);
            const bool left = must && Cut(v, L, S).after == 0 && !Corner(v, L, S).fits;
            if (left || !agrees(v, L, S)) {
              std::printf("wrong: L=%ld S=%ld causal=%ld window=%ld key_stride=%ld\n", long(L), long(S),
                          long(causal), long(window), long(stride));
              return 1;
            }
            ++cases, cut += Cut(v, L, S).after > 0;
          }
  std::printf("%ld causal calls right, %ld of them cut\n", long(cases), long(cut));
}
