#pragma once

// One body compiled for each instruction set; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TLM_CLONES
#endif
