#include "gather.h"

#include "pack.h"

namespace two_level_mha {

std::vector<Tensor> gather_along(const std::vector<Tensor>& pieces, int64_t dim, const c10::SymInt& size,
                                 bool zigzag, const Group& group) {
  std::vector<c10::SymInt> sizes;
  for (const Tensor& piece : pieces)
    for (int64_t i = 0; i < 4; ++i) sizes.push_back(i == dim ? size : piece.sym_size(i));
  const std::vector<int64_t> replicated(pieces.size(), -1), dims(pieces.size(), dim);
  Tensor buffer = start(Collective::all_gather, pack(pieces, replicated, 1, false), group)();
  return unpack(buffer, sizes, dims, group.size, zigzag);
}

}  // namespace two_level_mha
