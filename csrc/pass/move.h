// The exchanges into the layout of a call's scheme and out of it, and what goes with its tokens.
#pragma once

#include "../comm/exchange.h"
#include "context.h"

namespace two_level_mha {

using at::Tensor;

// This rank's part of x, which has the whole of sharded_dim,
// with `fill` beyond its end; x if nothing is sharded.
Tensor shard(const Tensor& x, const Context& context, double fill = 0.0);
// Positions of a turn's tokens first, ..., first + count - 1, int64 on the device of `like`; run > 0.
Tensor positions_of(const Turn& turn, const c10::SymInt& first, const c10::SymInt& count, const Tensor& like);
// Of x, whose `dim` has positions from `first` on, those that are this rank's turn.
Tensor own_positions(const Tensor& x, int64_t dim, const c10::SymInt& first, const Context& context);

// Columns of heads, `dim`, of this rank's slice, filled up to the widest one, as exchanges send them.
Tensor filled(const Tensor& x, int64_t dim, const Context& context);

// q, k, v as projected -> as the scheme's row says, in one exchange inside the slice group.
Later<std::vector<Tensor>> begin_move_in(const std::vector<Tensor>& qkv, const Context& context);

// O in the layout of q -> as it would have been projected: d-slices or whole heads, of all rows.
Later<Tensor> begin_move_out(const Tensor& o, const Context& context);
// Whether that is an exchange.
bool moves_out(const Context& context);

// O and logsumexp over this rank's keys, of all rows -> O over all keys, as it would have been projected.
Tensor merge_out(const Tensor& o, const Tensor& logsumexp, const Context& context);

}  // namespace two_level_mha
