// csrc/attend/aten/corner.h, by which ATen's CUDA kernels take a causal call, against visible.h: whether what
// a kernel would show each row is what each row sees. A failure localises keys that a row loses or gains.
#include "../../csrc/attend/aten/corner.h"

#include <algorithm>
#include <cstdio>

using namespace two_level_mha;

namespace {

// Whether the stripes of a call are all its rows that see a key, once each, and show each the keys that it sees.
bool agrees(const Visible& v, int64_t L, int64_t S, bool& fit) {
  std::vector<int> pieces_with(L, 0);
  for (const Stripe& stripe : stripes_of(v, L, S)) {
    const Corner corner(stripe.visible, stripe.rows, S);
    fit = fit && corner.fits;
    for (int64_t row = 0; row < stripe.rows; ++row) {
      const int64_t here = stripe.first + row * stripe.step;
      if (here >= L || pieces_with[here]++) return false;
      if (!corner.fits) continue;
      const int64_t end = corner.keys - (corner.causal ? stripe.rows - 1 - row : 0);
      const int64_t begin = corner.window ? std::max<int64_t>(end - *corner.window, 0) : 0;
      if (begin >= end || !(v.keys_of(here, S) == Range{corner.first_key + begin, corner.first_key + end}))
        return false;
    }
  }
  for (int64_t row = 0; row < L; ++row)
    if (v.keys_of(row, S).empty() ? fit && pieces_with[row] : !pieces_with[row]) return false;
  return true;
}

}  // namespace

int main() {
  int64_t cases = 0, refused = 0;
  for (int64_t L = 1; L <= 6; ++L)
    for (int64_t S = 1; S <= 6; ++S)
      for (int64_t causal = -7; causal <= 9; ++causal)
        for (int64_t window = 0; window <= 7; ++window)
          for (int64_t stride = 1; stride <= 4; ++stride) {
            Visible v{causal, std::nullopt, stride};
            if (window > 0) v.window = window - 1;
            bool fit = true;
            const bool right = agrees(v, L, S, fit);
            const bool within = L - 1 + causal < S * stride;  // the last row's own key is there, or is none
            if (!right || (!fit && (!v.window || within))) {
              std::printf("wrong: L=%ld S=%ld causal=%ld window=%ld key_stride=%ld\n", long(L), long(S),
                          long(causal), long(window) - 1, long(stride));
              return 1;
            }
            ++cases, refused += !fit;
          }
  std::printf("%ld causal calls right, %ld windows past the last key refused\n", long(cases), long(refused));
}
