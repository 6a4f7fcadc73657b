// How CPU loops become vector code without tying the library to one machine: a function marked
// M2MKD_CLONES is compiled for several x86 levels and the loader picks one; other targets (aarch64
// has NEON in its baseline) and other compilers get the plain version. Callees must be
// M2MKD_INLINE, so that they are compiled inside each clone.

#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(M2MKD_NO_CLONES)
#define M2MKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define M2MKD_CLONES
#endif

#define M2MKD_INLINE inline __attribute__((always_inline))
// The same for a lambda, between its parameters and its body.
#define M2MKD_INLINE_LAMBDA __attribute__((always_inline))
