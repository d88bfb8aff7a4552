// Everything a C++ program needs: the grid, the scheme table and the ops as functions. Link
// two_level_mha::ops.
#pragma once

#include "attend/partial_attention.h"
#include "combine/reduce.h"
#include "grid.h"
#include "head/norm.h"
#include "head/rotary.h"
#include "move/exchange.h"
#include "move/pack.h"
#include "pass.h"
#include "project/projection.h"
#include "schemes.h"
