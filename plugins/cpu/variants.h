/* What all kernels here share: one copy for each level of x86-64, vectorized loops, the order of reductions. */
#ifndef FPQ_VARIANTS_H
#define FPQ_VARIANTS_H

/* One copy of a function for each level of x86-64, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(FPQ_ONE_VARIANT)
#define VARIANTS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VARIANTS
#endif

/* The loop's iterations are independent, though its arrays may be one and the same. */
#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
#endif

#define LANES 16 /* partial sums of a reduction, the same for all vector widths */
#if defined(_WIN32)
#define EXPORT /* all is exported where nothing says so */
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#endif
