/* Waiting for another thread's part of a call, which is at work on it. */
#ifndef FPQ_YIELD_H
#define FPQ_YIELD_H

#include <stdatomic.h>
#include <stdint.h>

#if defined(_WIN32)
__declspec(dllimport) int __stdcall SwitchToThread(void);
static inline void yield_processor(void) { SwitchToThread(); }
#else
#include <sched.h>
static inline void yield_processor(void) { sched_yield(); }
#endif

static inline void pause_processor(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Returns when *done is `count`: after a task's time at most, for which it is not worth to sleep; but where there are more
 * threads than processors, the one that is waited for may need this one's. */
static inline void wait_for(const atomic_llong *done, int64_t count) {
  enum { TRIES = 1 << 10 };
  int tries = 0;
  while (atomic_load_explicit(done, memory_order_acquire) < count)
    if (tries < TRIES) tries++, pause_processor();
    else yield_processor();
}

#endif
