// Index arithmetic of pack.h, the same for the CPU and the CUDA version. No torch.
#pragma once

#include <cstdint>

#include "../base/arithmetic.h"
#include "../base/host_device.h"

namespace two_level_mha {

// One tensor of an exchange: viewed as (outer, size, inner) around the dim it is split along. What a part
// holds of it is (outer, piece_rows, inner), contiguous, from `offset` on.
struct Piece {
  int64_t outer, size, inner;
  int64_t chunk;   // rows of one chunk; a part holds `chunks` of them
  int64_t chunks;  // 1, or 2 for zigzag, or 0 for replicated
  int64_t offset;  // of this tensor in a part, in elements
};

TLM_HOST_DEVICE int64_t piece_rows(const Piece& p) {
  return p.chunks == 0 ? p.size : p.chunk * p.chunks;
}

TLM_HOST_DEVICE int64_t piece_count(const Piece& p) {
  return p.outer * piece_rows(p) * p.inner;
}

// Row of the tensor that row `row` of part `part` holds; a result >= p.size is padding.
template <typename Index>
TLM_HOST_DEVICE Index source_row(const Piece& p, Index parts, Index part, Index row) {
  if (p.chunks == 0) return row;
  Index chunk = (Index)p.chunk;
  return row < chunk ? part * chunk + row : (2 * parts - 1 - part) * chunk + (row - chunk);
}

// dim == -1 replicates; zigzag concerns tensors split along dim 2 only.
inline Piece make_piece(const int64_t* sizes, int64_t ndim, int64_t dim, int64_t parts, bool zigzag,
                        int64_t offset) {
  Piece p{1, 1, 1, 0, 0, offset};
  for (int64_t i = 0; i < ndim; i++) (i < dim ? p.outer : i == dim ? p.size : p.inner) *= sizes[i];
  if (dim < 0) return p;
  p.chunks = zigzag && dim == 2 ? 2 : 1;
  p.chunk = ceil_div(p.size, parts * p.chunks);
  return p;
}

}  // namespace two_level_mha
