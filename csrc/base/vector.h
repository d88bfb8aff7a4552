// `N` scalars, moved as one. No torch.
#pragma once

namespace two_level_mha {

template <typename Scalar, int N>
struct alignas(sizeof(Scalar) * N) Vector {
  Scalar x[N];
};

}  // namespace two_level_mha
