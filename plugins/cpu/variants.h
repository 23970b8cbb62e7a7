/* What all kernels here share: one copy for each level of x86-64, vectorized loops, the order of reductions. */
#ifndef FPQ_VARIANTS_H
#define FPQ_VARIANTS_H

/* One copy of a function for each level of x86-64, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(FPQ_ONE_VARIANT)
#define VARIANTS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VARIANTS
#endif

/* The loop's iterations are independent, though its arrays may be one and the same. FEW_ELEMENTS: they are a constant
 * number so small that compilers would write them out one by one before they look for vectors. */
#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#define FEW_ELEMENTS _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
#define FEW_ELEMENTS _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16 /* partial sums of a reduction, the same for all vector widths */
#if defined(_WIN32)
#define EXPORT /* all is exported where nothing says so */
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#endif
