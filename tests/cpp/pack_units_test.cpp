// Runs the units of csrc/comm/pack_units.h, which are what the CUDA kernels run, on the host, against
// pack.h's contract written down plainly, in every dtype. A failure localises index arithmetic, strides, the
// choice of the unit's width, or sums that round more than once.
#include "../../csrc/comm/pack_units.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace two_level_mha;

namespace {

struct Layout {
  int64_t size[4], stride[4], dim;

  int64_t place(const int64_t* i) const {
    return i[0] * stride[0] + i[1] * stride[1] + i[2] * stride[2] + i[3] * stride[3];
  }
};

template <typename Scalar>
struct Tensor : Layout {
  std::vector<Scalar> data;
};

// Part `part` of the contract, element after element, in the order of the buffer.
template <typename Visit>
void walk(const Layout& t, int64_t parts, int64_t part, bool zigzag, Visit visit) {
  int64_t extent[4] = {t.size[0], t.size[1], t.size[2], t.size[3]};
  bool two = zigzag && t.dim == 2;
  int64_t chunk = 0;
  if (t.dim >= 0) {
    int64_t pieces = two ? 2 * parts : parts;
    chunk = (t.size[t.dim] + pieces - 1) / pieces;
    extent[t.dim] = two ? 2 * chunk : chunk;
  }
  int64_t i[4];
  for (i[0] = 0; i[0] < extent[0]; i[0]++)
    for (i[1] = 0; i[1] < extent[1]; i[1]++)
      for (i[2] = 0; i[2] < extent[2]; i[2]++)
        for (i[3] = 0; i[3] < extent[3]; i[3]++) {
          int64_t at[4] = {i[0], i[1], i[2], i[3]};
          bool inside = true;
          if (t.dim >= 0) {
            int64_t which = i[t.dim] < chunk ? part : 2 * parts - 1 - part;
            at[t.dim] = which * chunk + i[t.dim] % chunk;
            inside = at[t.dim] < t.size[t.dim];
          }
          visit(at, inside);
        }
}

template <int kBytes, typename Scalar, typename Real>
void run(bool pack, const PackParams& p) {
  if constexpr (kBytes >= sizeof(Scalar))
    for (uint32_t i = 0; i < (uint32_t)(p.parts * p.part_units); i++)
      pack ? PackWork<kBytes>{p}(i) : UnpackWork<kBytes, Scalar, Real>{p}(i);
}

template <typename Scalar, typename Real>
int64_t run_units(bool pack, PackParams p) {
  int64_t bytes = make_units(p, sizeof(Scalar));
  if (bytes == 16) run<16, Scalar, Real>(pack, p);
  if (bytes == 8) run<8, Scalar, Real>(pack, p);
  if (bytes == 4) run<4, Scalar, Real>(pack, p);
  if (bytes == 2) run<2, Scalar, Real>(pack, p);
  return bytes;
}

template <typename Scalar>
void expect(Scalar got, Scalar want, const char* what, int seed) {
  if (got == want) return;
  std::printf("%s, case %d: got %g, want %g\n", what, seed, (double)got, (double)want);
  std::exit(1);
}

template <typename Scalar, typename Real>
int64_t one_case(int seed) {
  std::mt19937 random(seed);
  auto pick = [&](int64_t low, int64_t high) { return low + (int64_t)(random() % (high - low + 1)); };
  auto number = [&] { return Scalar((float)pick(-999, 999) / 64); };
  int64_t parts = pick(1, 5), count = pick(1, 4);
  bool zigzag = pick(0, 1), wide = pick(0, 1);
  std::vector<Tensor<Scalar>> tensors(count);
  PackParams p{nullptr, parts, 0, (int32_t)count, {}};
  for (int64_t n = 0; n < count; n++) {
    Tensor<Scalar>& t = tensors[n];
    for (int d = 0; d < 4; d++) t.size[d] = pick(d == 3 ? 1 : 0, 5);
    if (wide) t.size[3] = 4 * parts * pick(1, 2);
    t.dim = pick(-1, 3);
    int order[4] = {0, 1, 2, 3};
    if (pick(0, 1)) std::swap(order[1], order[2]);  // heads and rows swapped, as a projection leaves them
    if (!wide && pick(0, 1)) std::swap(order[2], order[3]);  // last dim strided
    int64_t step = 1;
    for (int d = 3; d >= 0; d--) t.stride[order[d]] = step, step *= t.size[order[d]];
    t.data.resize(step + 4);
    for (Scalar& x : t.data) x = number();
    p.tensors[n] = make_packed(t.data.data(), t.size, t.stride, 4, t.dim, parts, zigzag, p.part_units);
    p.part_units += piece_count(p.tensors[n].piece);
  }
  std::vector<Scalar> buffer(parts * p.part_units, Scalar(-1000.f));
  p.buffer = (char*)buffer.data();
  int64_t bytes = run_units<Scalar, Real>(true, p);

  size_t at = 0;
  for (int64_t part = 0; part < parts; part++)
    for (Tensor<Scalar>& t : tensors)
      walk(t, parts, part, zigzag, [&](const int64_t* i, bool inside) {
        expect(buffer[at++], inside ? t.data[t.place(i)] : Scalar(0.f), "pack", seed);
      });
  expect((double)buffer.size(), (double)at, "size of a part", seed);

  for (Scalar& x : buffer) x = number();
  std::vector<std::vector<Real>> sums;
  for (Tensor<Scalar>& t : tensors) sums.emplace_back(t.data.size(), Real(0));
  at = 0;
  for (int64_t part = 0; part < parts; part++)
    for (int64_t n = 0; n < count; n++)
      walk(tensors[n], parts, part, zigzag, [&](const int64_t* i, bool inside) {
        const Real x = buffer[at++];
        if (inside) sums[n][tensors[n].place(i)] += x;
      });
  for (Tensor<Scalar>& t : tensors) std::fill(t.data.begin(), t.data.end(), Scalar(0.f));
  run_units<Scalar, Real>(false, p);
  for (int64_t n = 0; n < count; n++)
    for (size_t i = 0; i < sums[n].size(); i++)
      expect(tensors[n].data[i], Scalar(sums[n][i]), "unpack", seed);
  return bytes;
}

}  // namespace

int main() {
  int widths[17] = {};
  for (int seed = 0; seed < 20000; seed += 4) {
    widths[one_case<float, float>(seed)]++;
    widths[one_case<double, double>(seed + 1)]++;
    widths[one_case<c10::Half, float>(seed + 2)]++;
    widths[one_case<c10::BFloat16, float>(seed + 3)]++;
  }
  std::printf("20000 cases right; units of 16, 8, 4, 2 bytes: %d, %d, %d, %d\n", widths[16], widths[8],
              widths[4], widths[2]);
  return widths[16] > 0 && widths[8] > 0 && widths[4] > 0 && widths[2] > 0 ? 0 : 1;
}
