// Everything a C++ program needs: the grid, the scheme
// table and the ops as functions. Link two_level_mha::ops.
#pragma once

#include "attend/partial_attention.h"
#include "comm/exchange.h"
#include "comm/hierarchical.h"
#include "comm/pack.h"
#include "comm/replicated.h"
#include "head/norm.h"
#include "head/norm_rotary.h"
#include "head/rotary.h"
#include "pass/pass.h"
#include "pass/projection.h"
#include "plan/grid.h"
#include "plan/schemes.h"
