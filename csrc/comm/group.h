// The groups of ranks that collectives run in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace two_level_mha {

// A group of one has no name and costs nothing.
struct Group {
  std::string name;  // as torch.distributed names it
  int64_t size = 1;
  int64_t rank = 0;  // of this rank in it
  // For messages: the layer that exchanges, and "slice axis", "head axis" or "grid".
  std::string layer;
  const char* axis = "group";
};

// The groups of one rank of a grid.
struct Groups {
  Group slice;       // m ranks that share a head group: neighbours
  Group head;        // n ranks that share a slice
  Group grid;        // all of them
  int64_t node = 1;  // ranks of a node, by the profile: plan/profiles.h
};

// Ranks that a sum runs over: those of one group, or of two axes and of the group that holds both.
struct SumGroups {
  Group all;
  std::vector<Group> axes;  // of the two, the one whose ranks share a node first; empty: `all` is one axis
  int64_t node = 1;         // as Groups has it
};

inline SumGroups over_grid(const Groups& groups) {
  return {groups.grid, {groups.slice, groups.head}, groups.node};
}

}  // namespace two_level_mha
