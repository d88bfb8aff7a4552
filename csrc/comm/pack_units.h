// Pack and unpack as independent units of work of up to 16 bytes: what the CUDA kernels run, one unit a
// thread and step, and what tests run on the host. No torch.
//
// Unit `index` stands at that place of the buffer (parts, N), in units: so the buffer is read or written in
// order, and the other side is found by the index arithmetic of pack_index.h on the tensor's own strides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack_index.h"

namespace two_level_mha {

constexpr int kMaxPacked = 16;  // tensors of one call: the kernel's parameters must stay below 4 KB

// One tensor, up to four levels of (size, stride) with the split one at `split` (-1: replicated), in units.
struct PackedTensor {
  char* data;
  int32_t levels, split;
  int64_t size[4], stride[4];
  Piece piece;
};

struct PackParams {
  char* buffer;
  int64_t parts, part_units;  // the buffer is (parts, part_units)
  int32_t count;
  PackedTensor tensors[kMaxPacked];
};

template <int kBytes>
struct alignas(kBytes) Unit {
  uint32_t x[kBytes / 4];
};
template <>
struct alignas(2) Unit<2> {
  uint16_t x;
};
template <>
struct alignas(1) Unit<1> {
  uint8_t x;
};

// Where in the tensor unit `index` of its piece in part `part` stands, in units; -1 for padding.
template <typename Index>
TLM_HOST_DEVICE int64_t locate(const PackedTensor& t, Index parts, Index part, Index index) {
  int64_t offset = 0;
  for (int level = t.levels - 1; level >= 0; level--) {
    Index extent = level == t.split ? (Index)piece_rows(t.piece) : (Index)t.size[level];
    Index i = index;
    if (level > 0) {
      index = i / extent;
      i -= index * extent;
    }
    if (level == t.split) {
      i = source_row(t.piece, parts, part, i);
      if (i >= (Index)t.size[level]) return -1;
    }
    offset += (int64_t)i * t.stride[level];
  }
  return offset;
}

// Calls with(tensor, part, offset or -1) for the tensor that unit `index` of the buffer belongs to.
template <typename Index, typename With>
TLM_HOST_DEVICE void with_place(const PackParams& p, Index index, const With& with) {
  Index part = index / (Index)p.part_units;
  Index rest = index - part * (Index)p.part_units;
  int n = 0;
  while (n + 1 < p.count && rest >= (Index)p.tensors[n + 1].piece.offset) n++;
  const PackedTensor& t = p.tensors[n];
  with(t, part, locate(t, (Index)p.parts, part, rest - (Index)t.piece.offset));
}

template <int kBytes>
struct PackWork {
  PackParams p;

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index index) const {
    with_place(p, index, [&](const PackedTensor& t, Index, int64_t offset) {
      using U = Unit<kBytes>;
      ((U*)p.buffer)[index] = offset < 0 ? U{} : ((const U*)t.data)[offset];
    });
  }
};

// Scalar is the dtype where a tensor is summed over the
// parts, in Real; units of part 0 do that, in part order.
template <int kBytes, typename Scalar, typename Real>
struct UnpackWork {
  PackParams p;

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index index) const {
    with_place(p, index, [&](const PackedTensor& t, Index part, int64_t offset) {
      using U = Unit<kBytes>;
      if (t.split >= 0 && offset >= 0) ((U*)t.data)[offset] = ((const U*)p.buffer)[index];
      if (t.split < 0 && part == 0) ((U*)t.data)[offset] = sum(index);
    });
  }

 private:
  struct Scalars {
    alignas(kBytes) Scalar x[kBytes / sizeof(Scalar)];
  };

  template <typename Index>
  TLM_HOST_DEVICE Unit<kBytes> sum(Index index) const {
    constexpr int N = kBytes / sizeof(Scalar);
    Real total[N] = {};
    for (int64_t part = 0; part < p.parts; part++) {
      Scalars from = ((const Scalars*)p.buffer)[part * p.part_units + index];
      for (int i = 0; i < N; i++) total[i] += (Real)from.x[i];
    }
    union {
      Scalars scalars;
      Unit<kBytes> unit;
    } y{};
    for (int i = 0; i < N; i++) y.scalars.x[i] = (Scalar)total[i];
    return y.unit;
  }
};

// The tensor's levels in elements: dims of size 1 dropped and neighbours merged where the strides allow, so
// that contiguous memory is one long level. ndim <= 4.
inline PackedTensor make_packed(void* data, const int64_t* sizes, const int64_t* strides, int ndim,
                                int64_t dim, int64_t parts, bool zigzag, int64_t offset) {
  PackedTensor t{(char*)data, 0, -1, {}, {}, make_piece(sizes, ndim, dim, parts, zigzag, offset)};
  for (int i = 0; i < ndim; i++) {
    if (sizes[i] == 1 && i != dim) continue;
    int last = t.levels - 1;
    if (i != dim && last >= 0 && last != t.split && t.stride[last] == sizes[i] * strides[i]) {
      t.size[last] *= sizes[i];
      t.stride[last] = strides[i];
      continue;
    }
    if (i == dim) t.split = t.levels;
    t.size[t.levels] = sizes[i];
    t.stride[t.levels] = strides[i];
    t.levels++;
  }
  if (t.levels == 0) t.levels = 1, t.size[0] = 1, t.stride[0] = 1;
  return t;
}

// Whether `per` elements of `bytes` each can be moved as one unit everywhere.
inline bool units_fit(const PackParams& p, int64_t per, int64_t bytes) {
  if (p.part_units % per != 0 || (uintptr_t)p.buffer % (per * bytes) != 0) return per == 1;
  for (int n = 0; n < p.count; n++) {
    const PackedTensor& t = p.tensors[n];
    int last = t.levels - 1;
    bool fits = (uintptr_t)t.data % (per * bytes) == 0 && t.piece.offset % per == 0 && t.stride[last] == 1 &&
                t.size[last] % per == 0 && (t.split != last || t.piece.chunk % per == 0);
    for (int level = 0; level < last; level++) fits = fits && t.stride[level] % per == 0;
    if (!fits) return per == 1;
  }
  return true;
}

// Turns everything from elements to units of `per` elements; units_fit must hold.
inline void to_units(PackParams& p, int64_t per) {
  p.part_units /= per;
  for (int n = 0; n < p.count; n++) {
    PackedTensor& t = p.tensors[n];
    int last = t.levels - 1;
    for (int level = 0; level < last; level++) t.stride[level] /= per;
    t.size[last] /= per;
    t.piece.offset /= per;
    if (t.split == last) t.piece.chunk /= per;
  }
}

// Widest unit in bytes, 16 at most.
inline int64_t make_units(PackParams& p, int64_t bytes) {
  int64_t per = 16 / bytes;
  while (!units_fit(p, per, bytes)) per /= 2;
  to_units(p, per);
  return per * bytes;
}

}  // namespace two_level_mha
